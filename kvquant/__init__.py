"""KV-cache quantization for batched prefill."""
