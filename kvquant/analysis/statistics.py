"""`kvquant statistics`: paired tests of every scheme and task against the baseline.

Pairs are seeds: a seed fixes the samples, so both schemes saw the same ones; the samples themselves
are paired for a bootstrap interval. Seeds that draw their samples from one set of rows (LongBench)
share some and are not independent; there the pairs are the distinct rows, and a row's difference is
its mean over the seeds that drew it. With all differences equal there is no variance and no t-test:
if they are all zero the verdict is "identical" (p = 1), otherwise the difference is exact (p = 0,
an interval of width zero).
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kvquant.analysis.tables import read_table, write_table
from kvquant.config import StatisticsSpec, Study, load_study
from kvquant.errors import UserError

POINTS = 100.0  # in a task's value, of a sample's score of 1


@dataclass(frozen=True)
class PairedTest:
    """One comparison.

    Attributes:
        n: Pairs.
        mean: Mean difference (scheme minus baseline).
        low: Lower end of the confidence interval of the mean.
        high: Upper end.
        p: Two-sided paired t-test.
        p_equivalence: TOST: the larger of the two one-sided p values against the margin.
        effect: Cohen's d of paired differences (mean over standard deviation; of several groups,
            over the standard error times the root of n); infinite if there is no spread and the
            mean is not zero.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    p_equivalence: float
    effect: float


def paired_test(differences: np.ndarray, margin: float, alpha: float) -> PairedTest:
    """Paired t-test, interval, TOST and effect size of differences `[n]`.

    Raises:
        ValueError: No difference, or a margin that is not positive.
    """
    return grouped_test([differences], margin, alpha)


def grouped_test(groups: list[np.ndarray], margin: float, alpha: float) -> PairedTest:
    """The same of the mean of groups' mean differences, each group with a variance of its own.

    Degrees of freedom are Welch's and Satterthwaite's; with one group all is the paired t-test.

    Args:
        groups: Differences `[n]` of each group.
        margin: Of equivalence, in the unit of the differences.
        alpha: One minus the interval's level.

    Raises:
        ValueError: A group without a difference, or a margin that is not positive.
    """
    x = [np.asarray(group, dtype=float) for group in groups]
    if not x or min(group.size for group in x) == 0:
        raise ValueError("differences: empty")
    if margin <= 0:
        raise ValueError(f"margin: must be positive, got {margin}")
    n = sum(group.size for group in x)
    mean = float(np.mean([group.mean() for group in x]))
    if min(group.size for group in x) == 1:
        nan = float("nan")
        return PairedTest(n, mean, nan, nan, nan, nan, nan)
    if all(group.std(ddof=1) <= 1e-12 * max(1.0, abs(group.mean())) for group in x):
        inside = abs(mean) < margin
        same = abs(mean) <= 1e-12
        effect = 0.0 if same else float(np.copysign(np.inf, mean))
        return PairedTest(n, mean, mean, mean, float(same), float(not inside), effect)
    parts = np.array([group.var(ddof=1) / group.size for group in x])
    freedom = parts.sum() ** 2 / sum(
        part**2 / (group.size - 1) for part, group in zip(parts, x, strict=True)
    )
    error = float(np.sqrt(parts.sum())) / len(x)
    half = float(stats.t.ppf(1 - alpha / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    above = float(stats.t.sf((mean + margin) / error, freedom))
    below = float(stats.t.cdf((mean - margin) / error, freedom))
    effect = mean / (error * np.sqrt(n))
    return PairedTest(n, mean, mean - half, mean + half, p, max(above, below), effect)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment (Scandinavian J. Statistics 6, 1979); NaN stays NaN."""
    values = np.asarray(p, dtype=float)
    out = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * values[index]))
        out[index] = running
    return out


def bootstrap_interval(
    differences: np.ndarray, draws: int, alpha: float, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of sample-level differences `[n]`."""
    x = np.asarray(differences, dtype=float)
    if x.size == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    means = x[generator.integers(0, x.size, (draws, x.size))].mean(1)
    low, high = np.percentile(means, [100 * alpha / 2, 100 * (1 - alpha / 2)])
    return float(low), float(high)


def verdict(test: PairedTest, p_holm: float, alpha: float, higher_is_better: bool) -> str:
    """identical, worse, better, equivalent, or inconclusive.

    A difference that is significant after Holm's adjustment and equivalent within the margin is
    called by its direction with "(within margin)".
    """
    if test.n < 2:
        return "inconclusive"
    if test.mean == 0 and test.low == test.high == 0:
        return "identical"
    equivalent = test.p_equivalence < alpha
    if p_holm < alpha:
        side = "better" if (test.mean > 0) == higher_is_better else "worse"
        return f"{side} (within margin)" if equivalent else side
    return "equivalent" if equivalent else "inconclusive"


def _pair(table: pd.DataFrame, baseline: pd.DataFrame, keys: list[str], what: str) -> pd.DataFrame:
    """Pairs of two tables by their keys, with columns `ours`, `base` and `difference`."""
    column = "value" if "value" in table else "score"
    joined = table[[*keys, column]].merge(
        baseline[[*keys, column]], on=keys, how="outer", suffixes=("", "_base"), indicator=True
    )
    if (joined["_merge"] != "both").any():
        raise UserError(f"statistics: {what} is not paired with the baseline on {keys}")
    ours, base = joined[column], joined[f"{column}_base"]
    return joined[keys].assign(ours=ours, base=base, difference=ours - base)


def _by_row(scored: pd.DataFrame, baseline: pd.DataFrame, what: str) -> list[pd.DataFrame]:
    """Pairs of a task's distinct rows, a table a task; scores in points."""
    keys = ["task", "seed", "sample", "row"]
    pairs = _pair(scored, baseline, keys, what)
    columns = ["ours", "base", "difference"]
    means = pairs.groupby(["task", "row"])[columns].mean() * POINTS
    return [task for _, task in means.groupby(level="task")]


def _suite_means(evaluations: pd.DataFrame) -> pd.DataFrame:
    """A row a (model, scheme, suite, seed) of scores: the mean over the suite's tasks.

    Perplexities of different windows have no meaningful mean, and one task is its own mean. Where a
    scheme lacks tasks of the suite (an unfinished study), its mean would be one of other tasks.
    """
    scored = evaluations[evaluations["suite"] != "perplexity"]
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


def _compare(
    study: Study, tables: list[pd.DataFrame], samples: np.ndarray, suite: str, what: str
) -> dict[str, Any]:
    """The numbers of a comparison: of pairs, in groups, and of paired samples' differences."""
    spec: StatisticsSpec = study.statistics
    margin = spec.margins.get(suite)
    if margin is None:
        raise UserError(f"statistics.margins: no margin for the suite '{suite}'")
    test = grouped_test([t["difference"].to_numpy() for t in tables], margin, spec.alpha)
    low, high = bootstrap_interval(samples, spec.bootstrap, spec.alpha, zlib.crc32(what.encode()))
    return {
        "baseline_mean": float(np.mean([t["base"].mean() for t in tables])),
        "mean": float(np.mean([t["ours"].mean() for t in tables])),
        "difference": test.mean,
        "ci_low": test.low,
        "ci_high": test.high,
        "pairs": test.n,
        "p": test.p,
        "p_holm": float("nan"),
        "margin": margin,
        "p_equivalence": test.p_equivalence,
        "equivalent": bool(test.p_equivalence < spec.alpha),
        "effect_size": test.effect,
        "sample_pairs": int(samples.size),
        "sample_difference": float(samples.mean()),
        "sample_ci_low": low,
        "sample_ci_high": high,
        "verdict": "",
        "_test": test,
    }


def test_all(study: Study, evaluations: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """One row a (model, task, scheme), and one a (model, suite of several tasks, scheme).

    `level` tells them apart ("task", "suite"), and `paired_by` what is paired ("seed", "row").
    Holm's family is all rows of a model and level.

    Raises:
        UserError: Pairs or a margin are missing, or the samples are of an older version.
    """
    if "row" not in samples:
        raise UserError("statistics: the table 'samples' has no column 'row': `aggregate` again")
    rows = []
    levels = (("task", evaluations), ("suite", _suite_means(evaluations)))
    for level, values in levels:
        for (model, name), group in values.groupby(["model", "task"], sort=False):
            base = group[group["scheme"] == study.baseline]
            mine = samples[(samples["model"] == model) & (samples[level] == name)]
            base_samples = mine[mine["scheme"] == study.baseline]
            keys = ["seed", "sample"] if level == "task" else ["task", "seed", "sample"]
            for scheme in study.schemes:
                ours = group[group["scheme"] == scheme]
                if scheme == study.baseline or not len(ours):  # it cannot run the task's protocol
                    continue
                what = f"{model}/{scheme}/{name}" + (" suite" if level == "suite" else "")
                scored = mine[mine["scheme"] == scheme]
                tables = [_pair(ours, base, ["seed"], what)]
                shared = bool(scored["row"].notna().any())
                if shared:
                    tables = _by_row(scored, base_samples, what)
                    differences = pd.concat(tables)["difference"].to_numpy() / POINTS
                else:
                    sampled = _pair(scored, base_samples, keys, what)
                    differences = sampled["difference"].to_numpy()
                first = ours.iloc[0]
                facts = {fact: first[fact] for fact in ("suite", "metric", "higher_is_better")}
                found = {"model": model, "level": level, "task": name, "scheme": scheme, **facts}
                found["paired_by"] = "row" if shared else "seed"
                rows.append(found | _compare(study, tables, differences, first["suite"], what))
    table = pd.DataFrame(rows)
    for _, family in table.groupby(["model", "level"]):
        table.loc[family.index, "p_holm"] = holm(family["p"].to_numpy())
    table["verdict"] = [
        verdict(row["_test"], row["p_holm"], study.statistics.alpha, row["higher_is_better"])
        for _, row in table.iterrows()
    ]
    return table.drop(columns="_test")


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
