"""Models with a quantized cache: loading, attention, generation, CUDA-graph decoding."""
