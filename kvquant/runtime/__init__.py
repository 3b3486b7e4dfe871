"""The machine of a process: GPU claims, provenance, locks, progress and Slurm."""
