"""The options of `kvquant calibrate` and `kvquant quantize`, said without importing torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def calibrate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant calibrate`, which has two ways: from texts, and of a study."""
    parser.usage = """
kvquant calibrate --model FOLDER_OR_HUB_ID --text FILE [FILE ...] --out FOLDER
           [--bits BITS | --scheme SCHEME] [--windows N] [--window N] [--seed N]
           [--device DEVICE]
   or: kvquant calibrate --study STUDY --model NAME --model-manifest FILE
           --data-manifest FILE --out FILE [--calibration NAME] [--device DEVICE]
""".strip()
    parser.description = (
        "Build a quantizer for a model from texts, in a folder that `kvquant generate`, `chat`, "
        "`compare` and kvquant.load take. With --study, collect the statistics of a study's "
        "calibration instead, from which `kvquant quantize` builds its quantizers."
    )
    both = parser.add_argument_group("both ways")
    both.add_argument("--model", help="folder or hub id; with --study: name of the study's model")
    both.add_argument("--out", type=Path, help="folder; with --study: stats.safetensors")
    both.add_argument("--device", default="auto", help="cpu, cuda or auto")
    texts = parser.add_argument_group("from texts")
    texts.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="UTF-8 texts like those that the model will read",
    )
    texts.add_argument(
        "--bits",
        type=int,
        help="4, 3 or 2, of allocated codes (4.4, 3.4, 2.4 with all); default: 3",
    )
    texts.add_argument(
        "--scheme", help="another scheme: its name or kind, or kind=nuq,bits=3,outliers=0.02"
    )
    texts.add_argument("--windows", type=int, metavar="N", help="windows of text; default: 16")
    texts.add_argument(
        "--window", type=int, metavar="N", help="tokens per window; default: up to 2048"
    )
    texts.add_argument("--seed", type=int, metavar="N", help="chooses the windows; default: 0")
    study = parser.add_argument_group("of a study")
    study.add_argument("--study", help="study file (YAML or JSON)")
    study.add_argument("--model-manifest", type=Path, help="manifest.json of fetch-model")
    study.add_argument("--data-manifest", type=Path, help="manifest.json of fetch-data")
    study.add_argument(
        "--calibration", help="entry of the study's `calibrations`; default: its `calibration`"
    )


def quantize(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant quantize`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument("--scheme", required=True, help="name of the scheme in the study")
    parser.add_argument("--stats", required=True, type=Path, help="stats.safetensors")
    parser.add_argument("--out", required=True, type=Path, help="quantizer.json")
