"""Measures the accuracy of a scheme, with one module per suite."""
