"""The options of `kvquant calibrate` and `kvquant quantize`, said without importing torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def calibrate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant calibrate`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument(
        "--model-manifest", required=True, type=Path, help="manifest.json of fetch-model"
    )
    parser.add_argument(
        "--data-manifest", required=True, type=Path, help="manifest.json of fetch-data"
    )
    parser.add_argument(
        "--calibration", help="entry of the study's `calibrations`; default: its `calibration`"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--out", required=True, type=Path, help="stats.safetensors")


def quantize(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant quantize`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument("--scheme", required=True, help="name of the scheme in the study")
    parser.add_argument("--stats", required=True, type=Path, help="stats.safetensors")
    parser.add_argument("--out", required=True, type=Path, help="quantizer.json")
