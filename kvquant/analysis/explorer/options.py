"""The options of `kvquant explorer`, said without importing pandas."""

from __future__ import annotations

import argparse
from pathlib import Path


def explorer(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant explorer`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out", required=True, type=Path, help="explorer.html")
