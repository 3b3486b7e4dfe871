"""The options of the verbs that measure accuracy, said without importing torch."""

from __future__ import annotations

import argparse


def prompts(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant prompts`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument("--task", required=True, help="name of the task in the study")
    parser.add_argument("--seeds", required=True, nargs="+", type=int, help="seeds to prepare")
    parser.add_argument("--model-manifest", required=True, help="manifest.json of fetch-model")
    parser.add_argument("--data-manifest", help="manifest.json of fetch-data, for tasks with text")
    parser.add_argument("--out", required=True, help="file of prompts to write (.jsonl.gz)")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant evaluate`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument("--scheme", required=True, help="name of the scheme in the study")
    parser.add_argument("--task", required=True, nargs="+", help="names of tasks in the study")
    parser.add_argument("--seeds", required=True, nargs="+", type=int, help="seeds to measure")
    parser.add_argument("--model-manifest", required=True, help="manifest.json of fetch-model")
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="file of `kvquant prompts`, per task with answers"
    )
    parser.add_argument(
        "--data-manifest", nargs="+", default=[], help="manifest.json of fetch-data, per other task"
    )
    parser.add_argument("--quantizer", help="quantizer.json, for schemes that need calibration")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument(
        "--out-dir", required=True, nargs="+", help="folder of seedN/run.json, per task"
    )
    parser.add_argument("--resume-dir", help="folder that keeps finished seeds of unfinished jobs")
