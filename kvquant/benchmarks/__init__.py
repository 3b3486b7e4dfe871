"""Measures throughput, energy, append cost and kernels, interleaved with the baseline."""
