"""Collects statistics of keys and values and builds quantizers from them."""
