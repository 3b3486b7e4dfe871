"""The options of the verbs that fetch models and texts, said without importing pydantic."""

from __future__ import annotations

import argparse


def fetch_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant fetch-model`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument(
        "--out", required=True, help="manifest.json; the model's files go beside it"
    )


def fetch_data(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant fetch-data`."""
    from kvquant.study.datasets import DATASETS

    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    known = ", ".join(sorted(DATASETS))
    parser.add_argument(
        "--dataset", required=True, help=f"an entry of the study's `datasets`, or one of: {known}"
    )
    parser.add_argument("--out", required=True, help="manifest.json; text.txt goes beside it")
