"""`kvquant statistics`: tests every scheme and task against the baseline, in pairs.

Two tests stand side by side. Over seeds: a paired t-test with Cohen's d and TOST, as studies of few
seeds report. Over prompts (windows of text, for perplexity): which asks every pair that was
measured, and gives the verdict (:mod:`kvquant.analysis.sample_tests`). docs/evaluation.md says why,
and what each column is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pandas as pd

from kvquant.analysis.comparison import compare_scores, compare_windows, numbers_of, pair
from kvquant.analysis.paired import holm
from kvquant.analysis.sample_tests import SampleTest
from kvquant.analysis.tables import read_table, write_table
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study
from kvquant.study.suite import scored_suites

FAMILY = ["model", "level", "suite"]  # comparisons that Holm adjusts together
# What a comparison is known by; a table without any has these columns.
KEYS = ("model", "level", "task", "scheme", "suite", "metric", "higher_is_better")
PLACES = ("row", "start", "tokens")  # columns of samples that older tables lack


def verdict(
    test: SampleTest, p_holm: float, alpha: float, higher_is_better: bool, margin: float,
    informative: bool = True,
) -> str:  # fmt: skip
    """Returns identical, worse, better, equivalent, not informative or inconclusive.

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


def _suite_means(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per (model, scheme, suite, seed) of scores: the mean over the suite's tasks.

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


def _by_scheme(table: pd.DataFrame) -> Callable[[str], pd.DataFrame]:
    """Returns a function that gives the rows of a scheme, which may be none."""
    parts = dict(iter(table.groupby("scheme", sort=False)))
    return lambda scheme: parts.get(scheme, table.iloc[:0])


def test_all(study: Study, evaluations: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per (model, task, scheme) and per (model, suite of several tasks, scheme).

    `level` tells them apart ("task", "suite"). Holm's family is all rows of a model, level and
    suite. What the baseline has no result of yet, in an unfinished study, has no row.

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
            mine = samples[(samples["model"] == model) & (samples[level] == name)]
            by_scheme, samples_of = (_by_scheme(table) for table in (group, mine))
            base, base_samples = by_scheme(study.baseline), samples_of(study.baseline)
            for scheme in study.schemes:
                ours = by_scheme(scheme)
                if scheme == study.baseline or not len(ours):  # it cannot run the task's protocol
                    continue
                if not len(base):  # of an unfinished study: nothing to compare with yet
                    continue
                what = f"{model}/{scheme}/{name}" + (" suite" if level == "suite" else "")
                first = ours.iloc[0]
                suite = str(first["suite"])
                margin = study.statistics.margins.get(suite)
                if margin is None:
                    raise UserError(f"statistics.margins: no margin for the suite '{suite}'")
                by_seed = pair(ours, base, ["seed"], what)
                scored = samples_of(scheme)
                keys = ["seed", "sample"] if level == "task" else ["task", "seed", "sample"]
                pairs = pair(scored, base_samples, keys, what)
                places = scored[list(dict.fromkeys([*keys, "task", *PLACES]))]
                pairs = pairs.merge(places, on=keys)
                compare = compare_scores if suite in scored_suites() else compare_windows
                found = compare(study, by_seed, pairs, margin, what)
                facts = {fact: first[fact] for fact in ("suite", "metric", "higher_is_better")}
                row = {"model": model, "level": level, "task": name, "scheme": scheme, **facts}
                row["sinks"] = getattr(study.schemes[scheme], "sinks", 0)
                rows.append(row | numbers_of(study, found, by_seed, margin))
    if not rows:
        return pd.DataFrame(columns=list(KEYS))
    table = pd.DataFrame(rows)
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


def run(args: argparse.Namespace) -> None:
    """Writes tests.parquet and tests.csv."""
    table = test_all(
        load_study(args.study), read_table(args.tables, "eval"), read_table(args.tables, "samples")
    )
    sources = [args.tables / f"{name}.parquet" for name in ("eval", "samples")]
    write_table(table, args.out_dir / "tests.parquet", sources)
    print(f"statistics: {len(table)} comparisons")
