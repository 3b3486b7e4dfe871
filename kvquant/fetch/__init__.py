"""Fetching: models and texts, by pinned version and hash, whole or not at all."""
