"""The options of `kvquant archive`, said without importing pydantic."""

from __future__ import annotations

import argparse
from pathlib import Path


def archive(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant archive`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument(
        "--archive",
        type=Path,
        help="folder of published records; default: the study's `published`",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path(),
        help="folder with LICENSE, CITATION.cff, requirements.lock and envs/; default: this one",
    )
    parser.add_argument("--sbom", type=Path, help="bill of materials (CycloneDX) to pack as well")
    parser.add_argument("--out", required=True, type=Path, help="the .zip file")
