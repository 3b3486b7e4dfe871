"""`python -m kvquant`."""

import os
import sys

from kvquant.cli import main

# An OpenMP thread that is done with its part spins for a millisecond, which on a busy machine keeps
# the core from the thread that it waits for: a forward pass on two cores took four times as long.
# libgomp reads this when torch is imported, which a verb does later.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
sys.exit(main())
