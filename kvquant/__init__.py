"""KV-cache quantization for batched prefill: library and measured, reproducible study."""

__version__ = "0.1.0"
