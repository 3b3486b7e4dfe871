"""Energy meters: NVML counters on a GPU, an estimate without them, carbon bookkeeping."""
