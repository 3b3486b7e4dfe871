"""Accuracy of a scheme: one file a suite, all behind :mod:`kvquant.evaluation.registry`."""
