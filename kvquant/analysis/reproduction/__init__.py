"""Compares results that somebody measured again with the published ones: `kvquant reproduce`."""
