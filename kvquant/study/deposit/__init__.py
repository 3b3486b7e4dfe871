"""Packs a study for a long-term repository such as Zenodo: `kvquant archive`."""
