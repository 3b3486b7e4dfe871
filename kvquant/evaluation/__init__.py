"""Evaluation suites: one file a suite, a registry, and the `evaluate` verb."""
