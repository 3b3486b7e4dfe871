"""`kvquant report`: writes Snakemake's HTML report of a study, whole or not at all.

Snakemake makes reports of workflows that have ended. A second process makes it here, of the targets
that the report shows, while the job that called it is the only one in the way of the end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kvquant.analysis.landing import STYLE
from kvquant.errors import UserError

TARGETS = ("figures", "html", "explorer")  # rules whose outputs the report shows
END = b"</html>"


def whole(report: Path) -> bool:
    """Returns whether a report is there to its last tag."""
    try:
        with report.open("rb") as file:
            file.seek(max(0, report.stat().st_size - 4096))
            return END in file.read()
    except OSError:
        return False


def remove_if_cut(report: Path) -> None:
    """Removes a truncated report so that Snakemake plans it, because Snakemake opens no file.

    Another time would not do: Snakemake also compares what a job has read, and that is unchanged.
    """
    try:
        if report.is_file() and not whole(report):
            report.unlink()
    except OSError:
        pass  # another's file: the plan stays as it is


def run(args: argparse.Namespace) -> None:
    """Writes the report beside its place and moves it there when it is whole.

    Raises:
        UserError: If Snakemake cannot make it; its own words are above.
    """
    part = args.out.with_name(f"{args.out.stem}.part.html")  # Snakemake asks for this suffix
    # The caller holds the lock; options of a profile are for its jobs.
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(args.snakefile)]
    command += ["--configfile", str(args.study), "--replace-workflow-config", "--nolock"]
    command += ["--quiet", "--cores", "1", "--report", str(part)]
    command += ["--report-stylesheet", str(STYLE), "--", *TARGETS]
    env = {k: v for k, v in os.environ.items() if k != "SNAKEMAKE_PROFILE"}
    try:
        done = subprocess.run(command, env=env, check=False)
        if done.returncode or not whole(part):
            raise UserError(f"{args.out}: snakemake --report failed (exit {done.returncode})")
        os.replace(part, args.out)
    finally:
        part.unlink(missing_ok=True)
    print(f"report: {args.out}")
