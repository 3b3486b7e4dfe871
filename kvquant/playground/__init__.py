"""Verbs by which people try a model over quantized caches: generate, chat, compare."""
