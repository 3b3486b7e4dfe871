"""Kernels in PyTorch, Triton and CUDA, their specification, and the choice between them."""
