"""The command that makes a study again, as a reader types it in the repository's folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Settings that name a place on one machine, with what a reader puts there.
PLACES = {"data_dir": "FOLDER"}


def _near(file: str | Path) -> str:
    """Returns a file's path from the current folder where it lies below, else as it is."""
    near = os.path.relpath(file)
    return str(file) if near.startswith(os.pardir) else near


def study_command(
    configfiles: Sequence[str | Path], replaces: bool, settings: Mapping[str, Any]
) -> str:
    """Returns the command line of Snakemake that makes a study.

    Args:
        configfiles: Study files that were given, after the workflow's own.
        replaces: Whether they replace the workflow's own study.
        settings: Settings of `--config`.
    """
    words = ["snakemake", "--cores", "all"]
    if configfiles:
        words += ["--configfile", *map(_near, configfiles)]
        words += ["--replace-workflow-config"] if replaces else []
    if settings:
        words.append("--config")
        for name, value in settings.items():
            shown = PLACES.get(name, value)
            words.append(f"{name}={shown if isinstance(shown, str) else json.dumps(shown)}")
    return shlex.join(words)
