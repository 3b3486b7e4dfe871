"""The options of the verbs that check and publish studies, said without importing pydantic."""

from __future__ import annotations

import argparse
from pathlib import Path


def study(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant study`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--out", type=Path, help="JSON to write; default: print it")


def grid(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant grid`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")


def schema(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant schema`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("config/schema.json"),
        help="JSON to write; default: config/schema.json",
    )


def seal(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant seal`."""
    parser.add_argument("--results", required=True, type=Path, help="the study's results folder")


def publish(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant publish`."""
    parser.add_argument(
        "--results", type=Path, help="a study's results folder; without it, nothing is added"
    )
    parser.add_argument(
        "--archive", required=True, type=Path, help="the study's folder of published records"
    )
    parser.add_argument(
        "--renew-sums", action="store_true", help="write SHA256SUMS anew, after a merge"
    )
