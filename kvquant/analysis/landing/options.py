"""The options of `kvquant landing`, said without importing pandas."""

from __future__ import annotations

import argparse
from pathlib import Path


def landing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant landing`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--results", required=True, type=Path, help="the study's results folder")
    parser.add_argument("--device-name", required=True, help="device in perf and energy paths")
    parser.add_argument("--figures", nargs="*", default=[], type=Path, help="its figures (.svg)")
    parser.add_argument("--pages", nargs="*", default=[], type=Path, help="its tables (.html)")
    parser.add_argument("--explorer", required=True, type=Path, help="its explorer.html")
    parser.add_argument(
        "--command", required=True, help="the command that makes the study, shown to readers"
    )
    parser.add_argument("--out", required=True, type=Path, help="landing.html, a part of a report")
