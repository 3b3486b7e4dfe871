"""The options of `kvquant reproduce`, said without importing pandas."""

from __future__ import annotations

import argparse
from pathlib import Path


def reproduce(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant reproduce`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument(
        "--results", required=True, type=Path, help="folder of the results that are your own"
    )
    parser.add_argument(
        "--archive",
        type=Path,
        help="folder of published records; default: the study's `reproduce.published`, or "
        "`published`",
    )
    parser.add_argument("--out", required=True, type=Path, help="reproduce.html")
    parser.add_argument(
        "--tables", required=True, type=Path, help="folder for reproduce.parquet and its CSV twin"
    )
    parser.add_argument(
        "--own-quantizers",
        action="store_true",
        help="compare also results whose quantizer was calibrated again where one is published",
    )
    parser.add_argument(
        "--fail-if-differs", action="store_true", help="exit with status 1 if anything differs"
    )
