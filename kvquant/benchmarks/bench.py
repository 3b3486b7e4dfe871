"""`kvquant bench WHAT`: measures costs on random data, and how evaluations scale over GPUs."""

from __future__ import annotations

import argparse
import importlib


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant bench`, by the module that is named like what it measures."""
    importlib.import_module(f"kvquant.benchmarks.{args.what}").run(args)
