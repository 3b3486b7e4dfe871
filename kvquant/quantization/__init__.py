"""Quantization of keys and values: batched packing, codebooks, rotations, quantizer files."""
