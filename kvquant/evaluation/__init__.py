"""Accuracy of a scheme: one file per suite, which `registry` resolves by name."""
