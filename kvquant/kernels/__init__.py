"""The backends that quantize, pack and read: CUDA, Triton and PyTorch.

`reference` is the specification, `pytorch_fused` runs everywhere, `backends` decides which runs.
"""
