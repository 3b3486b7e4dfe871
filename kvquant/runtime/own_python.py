"""Makes the workflow's rules call the same Python that runs Snakemake."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def find_own_python() -> None:
    """Puts the folder of this interpreter first in PATH unless PATH already has it.

    If `.venv/bin/snakemake` is started without activating its environment, jobs would otherwise
    run with another Python, which lacks the packages.
    """
    folder, folders = str(Path(sys.executable).parent), os.environ.get("PATH", "").split(os.pathsep)
    if folder not in folders:
        os.environ["PATH"] = os.pathsep.join([folder, *folders])
