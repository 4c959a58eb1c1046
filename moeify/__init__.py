"""moeify: dense PyTorch models into sparse Mixture-of-Experts models, with a proof."""

__version__ = "0.1.0"
