"""Benchmarks: throughput and energy of a scheme, interleaved with the unquantized baseline."""
