"""The options of the verbs that measure costs, said without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def throughput(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant throughput` and `kvquant energy`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument("--scheme", required=True, help="name of the scheme in the study")
    parser.add_argument("--workload", required=True, help="name of the workload in the study")
    parser.add_argument("--rep", required=True, type=int, help="repetition; seeds the prompts")
    parser.add_argument("--device-name", required=True, help="checked against the real device")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument(
        "--model-manifest", required=True, type=Path, help="manifest.json of fetch-model"
    )
    parser.add_argument(
        "--data-manifest",
        required=True,
        type=Path,
        help="manifest.json of fetch-data, of the study's calibration text",
    )
    parser.add_argument("--quantizer", type=Path, help="quantizer.json, for calibrated schemes")
    parser.add_argument("--out", required=True, type=Path, help="record to write")


energy = throughput


def append(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant bench append`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--rep", required=True, type=int, help="repetition; seeds the data")
    parser.add_argument("--device-name", required=True, help="checked against the real device")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--out", required=True, type=Path, help="record to write")


def jobs(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant bench jobs`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all cases")
    parser.add_argument("--device-name", required=True, help="checked against the real device")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--out-dir", required=True, type=Path, help="folder of CASE.json")


def kernels(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant bench kernels`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all cases")
    parser.add_argument("--device-name", required=True, help="checked against the real device")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--out-dir", required=True, type=Path, help="folder of CASE.json")


def scaling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant bench scaling`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", help="name of the model; default: the study's first")
    parser.add_argument("--schemes", nargs="+", required=True, help="names of schemes in the study")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks in the study")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the study's")
    parser.add_argument(
        "--processes-per-gpu", type=int, default=8, help="evaluations at a time on each GPU"
    )
    parser.add_argument(
        "--waves",
        type=int,
        default=2,
        help="evaluations that each place of all GPUs gets, one after the other",
    )
    parser.add_argument("--turns", type=int, default=1, help="runs on one GPU, and on all")
    parser.add_argument("--device", default="cuda", help="device of each evaluation")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")


# What `kvquant bench` measures, each in the module of its name.
WHAT: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "append": (append, "measure the cost of appending to a cache as it grows"),
    "jobs": (jobs, "run whole jobs of prompts and answers, by caches that take turns"),
    "kernels": (kernels, "time the headline scheme's kernels against copies, fp16 and peers"),
    "scaling": (scaling, "run the same evaluations on one GPU and on all visible ones"),
}


def bench(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant bench`."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (add, text) in WHAT.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add(sub)
