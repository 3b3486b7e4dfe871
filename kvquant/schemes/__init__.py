"""Cache schemes: one file per scheme kind, which `registry` resolves by name."""
