"""`kvquant statistics`: paired tests of every scheme and task against the baseline.

Two tests stand side by side. Over seeds: a paired t-test with Cohen's d and TOST, as studies of few
seeds report. Over prompts (windows of text, for perplexity): which asks every pair that was
measured, and gives the verdict (:mod:`kvquant.analysis.sample_tests`). docs/evaluation.md says why,
and what each column is.

Seeds that draw their samples from one set of rows (LongBench) share some and are not independent;
there the pairs of both tests are the distinct rows, and a row's difference is its mean over the
seeds that drew it. Seeds whose windows of text overlap are cuts of one text; there the pairs of
both tests are windows that do not overlap.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvquant.analysis.paired import PairedTest, grouped_test, holm
from kvquant.analysis.paired import paired_test as paired_test
from kvquant.analysis.sample_tests import (
    SampleTest,
    mean_interval,
    score_test,
    separate_windows,
    series_inflation,
    window_test,
)
from kvquant.analysis.tables import read_table, write_table
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study
from kvquant.study.margin import Margin
from kvquant.study.suite import scored_suites

POINTS = 100.0  # in a task's value, of a sample's score of 1
FAMILY = ["model", "level", "suite"]  # comparisons that Holm adjusts together
PLACES = ("row", "start", "tokens")  # columns of samples that older tables lack


def verdict(
    test: SampleTest, p_holm: float, alpha: float, higher_is_better: bool, margin: float,
    informative: bool = True,
) -> str:  # fmt: skip
    """identical, worse, better, equivalent, not informative or inconclusive.

    A difference is worse or better if its adjusted p is below alpha and the interval of the mean
    lies on that side of zero. One that is equivalent besides has "(within margin)" behind it.

    Args:
        test: Of the units.
        p_holm: Its adjusted p.
        alpha: Level.
        higher_is_better: Direction of the scores.
        margin: Of equivalence, in the unit of the test's mean.
        informative: Whether the baseline is far enough from chance to lose anything.
    """
    if test.n < 2:
        return "inconclusive"
    sign = 1 if higher_is_better else -1
    low, high = sorted((sign * test.low, sign * test.high))
    inside = -margin < test.inner_low and test.inner_high < margin
    if p_holm < alpha and (low > 0 or high < 0):
        side = "better" if low > 0 else "worse"
        return f"{side} (within margin)" if inside else side
    if not informative:
        return "not informative"
    if test.tied == test.n:
        return "identical"
    return "equivalent" if inside else "inconclusive"


def _pair(table: pd.DataFrame, baseline: pd.DataFrame, keys: list[str], what: str) -> pd.DataFrame:
    """Pairs of two tables by their keys, with columns `ours`, `base` and `difference`."""
    column = "value" if "value" in table else "score"
    for side, name in ((table, what), (baseline, f"{what}: the baseline")):
        twice = side[side.duplicated(keys)]
        if len(twice):
            at = ", ".join(f"{k} {twice.iloc[0][k]}" for k in keys)
            raise UserError(f"statistics: {name} is there twice ({at}): `aggregate` again")
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
class _Compared:
    """What a comparison found, in the unit of the metric."""

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


def _windows(
    study: Study, by_seed: pd.DataFrame, pairs: pd.DataFrame, margin: Margin, what: str
) -> _Compared:
    """Perplexity: over seeds if their windows share no token, else over windows; and windows."""
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
    return _Compared(
        seeds, "seed" if whole else "window", window_test(differences, windows), "window",
        False, note, nats, (lambda value: value) if whole else nats,
    )  # fmt: skip


def _scores(
    study: Study, by_seed: pd.DataFrame, pairs: pd.DataFrame, margin: Margin, what: str
) -> _Compared:
    """Scores of prompts: of a task, or of all tasks of a suite."""
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
    return _Compared(
        seeds, "row" if shared else "seed", test, "row" if shared else "prompt", chance_like,
        note, lambda value: value * POINTS, lambda value: value,
    )  # fmt: skip


def _suite_means(evaluations: pd.DataFrame) -> pd.DataFrame:
    """A row a (model, scheme, suite, seed) of scores: the mean over the suite's tasks.

    Perplexities of different windows have no meaningful mean, and one task is its own mean. Where a
    scheme lacks tasks of the suite (an unfinished study), its mean would be one of other tasks.
    """
    scored = evaluations[evaluations["suite"].isin(scored_suites())]
    if not len(scored):
        return evaluations.iloc[:0]
    keys = ["model", "scheme", "suite", "seed"]
    shared = {"metric": ("metric", "first"), "higher_is_better": ("higher_is_better", "first")}
    means = scored.groupby(keys, sort=False, as_index=False).agg(
        value=("value", "mean"), tasks=("task", "nunique"), **shared
    )
    most = means.groupby(["model", "suite"])["tasks"].transform("max")
    whole = (means["tasks"] > 1) & (means["tasks"] == most)
    return means[whole].assign(task=means["suite"])


def _row(study: Study, found: _Compared, by_seed: pd.DataFrame, margin: Margin) -> dict[str, Any]:
    """The numbers of a comparison in the unit of its metric."""
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


def test_all(study: Study, evaluations: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """One row a (model, task, scheme), and one a (model, suite of several tasks, scheme).

    `level` tells them apart ("task", "suite"). Holm's family is all rows of a model, level and
    suite.

    Raises:
        UserError: Pairs or a margin are missing, samples are there twice or in other numbers than
            the baseline's, or the table is of an older version.
    """
    for column in PLACES:
        if column not in samples:
            raise UserError(
                f"statistics: the table 'samples' has no column '{column}': `aggregate` again"
            )
    rows = []
    levels = (("task", evaluations), ("suite", _suite_means(evaluations)))
    for level, values in levels:
        for (model, name), group in values.groupby(["model", "task"], sort=False):
            base = group[group["scheme"] == study.baseline]
            mine = samples[(samples["model"] == model) & (samples[level] == name)]
            base_samples = mine[mine["scheme"] == study.baseline]
            for scheme in study.schemes:
                ours = group[group["scheme"] == scheme]
                if scheme == study.baseline or not len(ours):  # it cannot run the task's protocol
                    continue
                what = f"{model}/{scheme}/{name}" + (" suite" if level == "suite" else "")
                first = ours.iloc[0]
                suite = str(first["suite"])
                margin = study.statistics.margins.get(suite)
                if margin is None:
                    raise UserError(f"statistics.margins: no margin for the suite '{suite}'")
                by_seed = _pair(ours, base, ["seed"], what)
                scored = mine[mine["scheme"] == scheme]
                keys = ["seed", "sample"] if level == "task" else ["task", "seed", "sample"]
                pairs = _pair(scored, base_samples, keys, what)
                places = scored[list(dict.fromkeys([*keys, "task", *PLACES]))]
                pairs = pairs.merge(places, on=keys)
                compare = _scores if suite in scored_suites() else _windows
                found = compare(study, by_seed, pairs, margin, what)
                facts = {fact: first[fact] for fact in ("suite", "metric", "higher_is_better")}
                row = {"model": model, "level": level, "task": name, "scheme": scheme, **facts}
                row["sinks"] = getattr(study.schemes[scheme], "sinks", 0)
                rows.append(row | _row(study, found, by_seed, margin))
    table = pd.DataFrame(rows)
    if not rows:
        return table
    for key, family in table.groupby(FAMILY):
        table.loc[family.index, "family"] = " / ".join(key)
        table.loc[family.index, "family_size"] = int(family["p_sample"].notna().sum())
        for p in ("p", "p_sample"):
            table.loc[family.index, f"{p}_holm"] = holm(family[p].to_numpy())
    table["verdict"] = [
        verdict(
            row["_test"], row["p_sample_holm"], study.statistics.alpha, row["higher_is_better"],
            row["_margin"], row["informative"],
        )
        for _, row in table.iterrows()
    ]  # fmt: skip
    return table.drop(columns=["_test", "_margin"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant statistics`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out-dir", required=True, type=Path)


def run(args: argparse.Namespace) -> None:
    """Writes tests.parquet and tests.csv."""
    table = test_all(
        load_study(args.study), read_table(args.tables, "eval"), read_table(args.tables, "samples")
    )
    sources = [args.tables / f"{name}.parquet" for name in ("eval", "samples")]
    write_table(table, args.out_dir / "tests.parquet", sources)
    print(f"statistics: {len(table)} comparisons")
