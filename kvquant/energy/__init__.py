"""Energy meters (NVML, RAPL, estimate), profiler and carbon bookkeeping."""
