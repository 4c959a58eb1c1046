"""The user's data as inputs of a model: a text, a folder of images, tensors, or batches from Python."""
