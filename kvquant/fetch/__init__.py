"""Fetches models and texts from their sources into local folders with checked manifests."""
