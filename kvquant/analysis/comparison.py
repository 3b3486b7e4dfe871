"""One comparison of a scheme with the baseline: pairs, both tests, and its numbers in a table.

Seeds that draw their samples from one set of rows (LongBench) share some and are not independent;
there the pairs of both tests are the distinct rows, and a row's difference is its mean over the
seeds that drew it. Seeds whose windows of text overlap are cuts of one text; there the pairs of
both tests are windows that do not overlap.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kvquant.analysis.paired import PairedTest, grouped_test
from kvquant.analysis.sample_tests import (
    SampleTest,
    mean_interval,
    score_test,
    separate_windows,
    series_inflation,
    window_test,
)
from kvquant.errors import UserError
from kvquant.study.config import Study
from kvquant.study.margin import Margin

POINTS = 100.0  # points of a task's value per unit of a sample's score


def pair(table: pd.DataFrame, baseline: pd.DataFrame, keys: list[str], what: str) -> pd.DataFrame:
    """Returns pairs of two tables by keys, with columns `ours`, `base` and `difference`."""
    column = "value" if "value" in table else "score"
    for side, name in ((table, what), (baseline, f"{what}: the baseline")):
        twice = side[side.duplicated(keys)]
        if len(twice):
            at = ", ".join(f"{k} {twice.iloc[0][k]}" for k in keys)
            raise UserError(f"statistics: {name} is there twice ({at}): `aggregate` again")
    mine, theirs = (side.sort_values(keys, ignore_index=True) for side in (table, baseline))
    if mine[keys].equals(theirs[keys]):  # as in all whole studies; a join takes twice as long
        ours, base = mine[column], theirs[column]
        return mine[keys].assign(ours=ours, base=base, difference=ours - base)
    joined = table[[*keys, column]].merge(
        baseline[[*keys, column]], on=keys, how="outer", suffixes=("", "_base"), indicator=True
    )
    alone = joined[joined["_merge"] != "both"]
    if len(alone):
        at = ", ".join(f"{k} {alone.iloc[0][k]}" for k in keys)
        raise UserError(
            f"statistics: {what} is not paired with the baseline on {keys}: {len(table)} against "
            f"{len(baseline)}, the first alone is {at}; measure both on the same samples"
        )
    ours, base = joined[column], joined[f"{column}_base"]
    return joined[keys].assign(ours=ours, base=base, difference=ours - base)


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison and how to convert them to the unit of the metric."""

    seeds: PairedTest
    paired_by: str
    samples: SampleTest
    unit: str
    chance_like: bool
    note: str
    of_samples: Callable[[float], float]  # from the unit of the samples' scores to the metric's
    of_seeds: Callable[[float], float]


def _seed(what: str) -> int:
    return zlib.crc32(what.encode())


def compare_windows(
    study: Study, by_seed: pd.DataFrame, pairs: pd.DataFrame, margin: Margin, what: str
) -> Comparison:
    """Compares windows, and seeds if their windows share no token."""
    alpha, base = study.statistics.alpha, float(by_seed["base"].mean())
    kept = separate_windows(pairs)
    differences = kept.sort_values("start")["difference"].to_numpy()
    windows = grouped_test(
        [differences], margin.in_nats(base), alpha, inflation=series_inflation(differences)
    )
    whole = len(kept) == len(pairs)
    note = "" if whole else f"one text: {len(kept)} of {len(pairs)} windows share no token"

    def nats(value: float) -> float:
        return base * float(np.expm1(value))

    seeds = windows
    if whole:
        differences_by_seed = by_seed["difference"].to_numpy()
        seeds = grouped_test([differences_by_seed], margin.half_width(base), alpha)
    return Comparison(
        seeds, "seed" if whole else "window", window_test(differences, windows), "window",
        False, note, nats, (lambda value: value) if whole else nats,
    )  # fmt: skip


def compare_scores(
    study: Study, by_seed: pd.DataFrame, pairs: pd.DataFrame, margin: Margin, what: str
) -> Comparison:
    """Compares scores of prompts, of a task or of all tasks of a suite."""
    spec = study.statistics
    base_mean = float(by_seed["base"].mean())
    shared = bool(pairs["row"].notna().any())
    if shared:
        drawn = len(pairs)
        pairs = pairs.groupby(["task", "row"])[["base", "difference"]].mean().reset_index()
        base_mean = float(pairs.groupby("task")["base"].mean().mean()) * POINTS
        groups = [task["difference"].to_numpy() * POINTS for _, task in pairs.groupby("task")]
        seeds = grouped_test(groups, margin.half_width(base_mean), spec.alpha)
        note = f"{len(pairs)} distinct rows of {drawn} drawn"
        clusters = ["task"]
    else:
        differences = by_seed["difference"].to_numpy()
        seeds = grouped_test([differences], margin.half_width(base_mean), spec.alpha)
        note = ""
        clusters = ["task", "seed"]

    def strata(column: str) -> list[list[np.ndarray]]:
        tasks: dict[Any, list[np.ndarray]] = {}
        for key, part in pairs.groupby(clusters):
            tasks.setdefault(key[0], []).append(part[column].to_numpy(dtype=float))
        return list(tasks.values())

    test = score_test(strata("difference"), spec.alpha, spec.bootstrap, _seed(what))
    low, *_ = mean_interval(
        strata("base"), spec.alpha, spec.bootstrap, _seed(f"{what} baseline"), (0.0, 1.0)
    )
    chance_like = base_mean < margin.floor or not low * POINTS > margin.chance
    return Comparison(
        seeds, "row" if shared else "seed", test, "row" if shared else "prompt", chance_like,
        note, lambda value: value * POINTS, lambda value: value,
    )  # fmt: skip


def numbers_of(
    study: Study, found: Comparison, by_seed: pd.DataFrame, margin: Margin
) -> dict[str, Any]:
    """Returns the numbers of a comparison in the unit of its metric."""
    seeds, samples = found.seeds, found.samples
    base, mean = (float(by_seed[side].mean()) for side in ("base", "ours"))
    difference = mean - base
    if found.paired_by == "row":  # whose means weigh a row once, however often it was drawn
        difference = seeds.mean
    width = margin.half_width(base)
    to_unit = found.of_samples
    return {
        "paired_by": found.paired_by,
        "baseline_mean": base,
        "mean": mean,
        "difference": difference,
        "ci_low": found.of_seeds(seeds.low),
        "ci_high": found.of_seeds(seeds.high),
        "pairs": seeds.n,
        "p": seeds.p,
        "p_holm": float("nan"),
        "margin": width,
        "p_equivalence": seeds.p_equivalence,
        "effect_size": seeds.effect,
        "unit": found.unit,
        "sample_pairs": samples.n,
        "won": samples.won,
        "lost": samples.lost,
        "tied": samples.tied,
        "sample_difference": to_unit(samples.mean),
        "sample_ci_low": to_unit(samples.low),
        "sample_ci_high": to_unit(samples.high),
        "sample_inner_low": to_unit(samples.inner_low),
        "sample_inner_high": to_unit(samples.inner_high),
        "p_sample": samples.p,
        "p_sample_holm": float("nan"),
        "informative": not found.chance_like,
        "family": "",
        "family_size": 0,
        "equivalent": bool(-width < to_unit(samples.inner_low))
        and bool(to_unit(samples.inner_high) < width),
        "verdict": "",
        "note": found.note,
        "_test": samples,
        "_margin": margin.in_nats(base) if found.unit == "window" else width / POINTS,
    }
