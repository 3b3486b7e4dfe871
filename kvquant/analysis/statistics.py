"""`kvquant statistics`: paired tests of every scheme and task against the baseline.

Pairs are seeds: a seed fixes the samples, so both schemes saw the same ones; the samples themselves
are paired for a bootstrap interval. With all differences equal there is no variance and no t-test:
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

from kvquant.analysis.collect import read_table, write_table
from kvquant.config import StatisticsSpec, Study, load_study
from kvquant.errors import UserError


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
        effect: Cohen's d of paired differences (mean over standard deviation); infinite if all
            differences are equal and not zero.
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
    x = np.asarray(differences, dtype=float)
    n = x.size
    if n == 0:
        raise ValueError("differences: empty")
    if margin <= 0:
        raise ValueError(f"margin: must be positive, got {margin}")
    mean = float(x.mean())
    if n == 1:
        nan = float("nan")
        return PairedTest(1, mean, nan, nan, nan, nan, nan)
    spread = float(x.std(ddof=1))
    if spread <= 1e-12 * max(1.0, abs(mean)):
        inside = abs(mean) < margin
        same = abs(mean) <= 1e-12
        effect = 0.0 if same else float(np.copysign(np.inf, mean))
        return PairedTest(n, mean, mean, mean, float(same), float(not inside), effect)
    error = spread / np.sqrt(n)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    above = float(stats.t.sf((mean + margin) / error, n - 1))
    below = float(stats.t.cdf((mean - margin) / error, n - 1))
    return PairedTest(n, mean, mean - half, mean + half, p, max(above, below), mean / spread)


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


def _pair(table: pd.DataFrame, baseline: pd.DataFrame, keys: list[str], what: str) -> np.ndarray:
    joined = table.merge(baseline, on=keys, how="outer", suffixes=("", "_base"), indicator=True)
    if (joined["_merge"] != "both").any():
        raise UserError(f"statistics: {what} is not paired with the baseline on {keys}")
    column = "value" if "value" in table else "score"
    return (joined[column] - joined[f"{column}_base"]).to_numpy()


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
    study: Study, ours: pd.DataFrame, base: pd.DataFrame, pairs: np.ndarray, what: str
) -> dict[str, Any]:
    """One row: seeds paired, and the mean and interval of paired samples."""
    spec: StatisticsSpec = study.statistics
    suite = str(ours["suite"].iloc[0])
    margin = spec.margins.get(suite)
    if margin is None:
        raise UserError(f"statistics.margins: no margin for the suite '{suite}'")
    differences = _pair(ours, base[["seed", "value"]], ["seed"], what)
    test = paired_test(differences, margin, spec.alpha)
    low, high = bootstrap_interval(pairs, spec.bootstrap, spec.alpha, zlib.crc32(what.encode()))
    return {
        "suite": suite,
        "metric": str(ours["metric"].iloc[0]),
        "higher_is_better": bool(ours["higher_is_better"].iloc[0]),
        "baseline_mean": float(base["value"].mean()),
        "mean": float(ours["value"].mean()),
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
        "sample_pairs": int(pairs.size),
        "sample_difference": float(pairs.mean()),
        "sample_ci_low": low,
        "sample_ci_high": high,
        "verdict": "",
        "_test": test,
    }


def test_all(study: Study, evaluations: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """One row a (model, task, scheme), and one a (model, suite of several tasks, scheme).

    `level` tells them apart ("task", "suite"). Holm's family is all rows of a model and level.
    """
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
                pairs = _pair(scored, base_samples[[*keys, "score"]], keys, what)
                found = {"model": model, "level": level, "task": name, "scheme": scheme}
                rows.append(found | _compare(study, ours, base, pairs, what))
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
    write_table(table, args.out_dir / "tests.parquet")
    print(f"statistics: {len(table)} comparisons")
