"""The tables of other published studies, of which a study's claims and article speak."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from kvquant.analysis.collect import collect
from kvquant.analysis.problems import Problems
from kvquant.analysis.study_tables import Tables
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study


def collect_published(study: Study) -> dict[str, pd.DataFrame]:
    """Returns the tables of a study's published records, empty ones where nothing is published yet.

    Raises:
        UserError: The study names no published records, or one of them cannot be used.
    """
    if study.published is None:
        raise UserError(f"'{study.study}' names no published records (key `published`)")
    # Beside published records no file of a job counts: the folder is new and empty.
    with tempfile.TemporaryDirectory() as folder:
        return collect(study, Path(folder), study.device, Problems(present=True))


def measures_attention(study: Study) -> bool:
    """Returns whether a scheme of a study attends to prompts in 8 bits."""
    return any(scheme.prompt_attention == "8-bit" for scheme in study.schemes.values())


def attention_companions(study: Study) -> Iterator[Tables]:
    """Yields the tables of a study's companions that are about 8-bit attention of prompts.

    They have no tests and no Pareto table, which no claim about it reads.

    Raises:
        UserError: A companion or one of its records cannot be used.
    """
    for file in study.companions.values():
        other = load_study(file)
        if measures_attention(other):
            found, none = collect_published(other), pd.DataFrame()
            timed = [found.get(name, none) for name in ("append", "jobs", "kernels")]
            costs = found["perf"], found["energy"]
            yield Tables(other, found["eval"], *costs, none, none, *timed).on_one_device()
