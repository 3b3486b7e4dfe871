"""Kernels: a slow specification (`reference`) and the fused PyTorch path (`pytorch_fused`)."""
