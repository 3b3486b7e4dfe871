"""The cache schemes, with one module per scheme kind that `registry` resolves by name."""
