"""The largest numbers that a study may contain.

The limits keep a typing error (such as 10^12 repetitions) from filling memory or a queue. Each is
far beyond what a machine can measure.
"""

from __future__ import annotations

MAX_TOKENS = 2**24  # per prompt, window or cache
MAX_BATCH = 2**16
MAX_SAMPLES = 100_000  # per task and seed
MAX_WINDOWS = 1_000_000
MAX_REPS = 1_000
MAX_ROUNDS = 1_000_000
MAX_MINUTES = 60 * 24 * 30
MAX_SECONDS = 60.0 * MAX_MINUTES
MAX_NAMES = 1_000  # schemes, tasks, workloads, seeds
MAX_COUNTRIES = 8  # a column each
MAX_RESULTS = 1_000_000  # per study
MAX_SEED = 2**31 - 1
