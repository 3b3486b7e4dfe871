"""The `python` that the workflow's rules call is the one that runs Snakemake."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def find_own_python() -> None:
    """Puts the folder of this interpreter first in PATH unless PATH names it already.

    `.venv/bin/snakemake` started without its environment being active would otherwise run jobs
    with another Python, which lacks the packages.
    """
    folder, folders = str(Path(sys.executable).parent), os.environ.get("PATH", "").split(os.pathsep)
    if folder not in folders:
        os.environ["PATH"] = os.pathsep.join([folder, *folders])
