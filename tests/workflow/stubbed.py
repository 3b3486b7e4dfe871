"""Runs the smoke study's DAG with stub verbs, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.snakemakes import run_snakemake

# The report's verb is real: it measures nothing.
STUB = '#!/bin/sh\nif [ "$1 $2" = "-m kvquant" ] && [ "$3" != report ]; then\n'
STUB += '  shift 2; exec {python} {stub} "$@"\nfi\n'
STUB += 'exec {python} "$@"\n'
Run = Callable[..., subprocess.CompletedProcess[str]]


def stubbed(root: Path, work: Path) -> Run:
    """A function that runs Snakemake in `work`; its keyword `changes` edits the study's text.

    Args:
        root: The repository.
        work: An empty folder.
    """
    stub = work / "bin/python"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable, stub=root / "tests/workflow/stub_verbs.py"))
    stub.chmod(0o755)
    folders = [str(stub.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = {**os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": str(root)}

    def run(
        *args: str, changes: Sequence[tuple[str, str]] = ()
    ) -> subprocess.CompletedProcess[str]:
        text = (root / "config/smoke.yaml").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (work / "study.yaml").write_text(text)
        command = ["--snakefile", str(root / "Snakefile")]
        command += ["--directory", str(work), "--configfile", str(work / "study.yaml")]
        command += ["--replace-workflow-config", "--cores", "2"]
        return run_snakemake([*command, *args], work, env)

    return run
