"""Lowerings for CUDA: the same operators scheduled for a GPU, built offline with nvcc."""
