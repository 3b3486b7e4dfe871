"""The machine that a process runs on: devices, provenance, locks, progress, Slurm."""
