"""Calibration: statistics of keys and values, and the quantizer built from them."""
