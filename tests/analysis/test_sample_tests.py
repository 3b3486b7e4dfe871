"""Tests over prompts, rows and windows: by hand, against scipy, and what must not change them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvquant.analysis.sample_tests import (
    clustered_means,
    mean_interval,
    score_test,
    separate_windows,
    series_inflation,
    sign_test,
)
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.statistics import verdict
from kvquant.study.config import Study, parse_study
from kvquant.study.margin import Margin

Pair = tuple[pd.DataFrame, pd.DataFrame]


def test_sign_test_by_hand() -> None:
    # of 8 prompts that differ one was won: 2 * (1 + 8) / 2^8
    assert sign_test(1, 7) == pytest.approx(18 / 256)
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(4, 4) == 1.0 and sign_test(0, 0) == 1.0
    # what was measured: passkey with KIVI-2, RULER with quanto-4
    assert sign_test(3, 66) == pytest.approx(1.86e-16, rel=0.01)
    assert sign_test(77, 133) == pytest.approx(1.4e-4, rel=0.04)
    assert 0 < sign_test(0, 5000) < 1e-300


@given(won=st.integers(0, 60), lost=st.integers(0, 60))
def test_sign_test_is_scipys_and_mirrors(won: int, lost: int) -> None:
    if won + lost:
        assert sign_test(won, lost) == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    assert sign_test(won, lost) == sign_test(lost, won)


def test_with_scores_of_0_and_1_it_is_the_exchange_of_all_signs() -> None:
    x = np.array([1.0, -1, -1, -1, 0, -1, -1, 0, -1])
    exchanged = stats.permutation_test(
        (x,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert score_test([[x]], 0.05, 200, 0).p == pytest.approx(exchanged.pvalue)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(1, 9), st.integers(0, 10**6))
def test_swapped_sides_mirror(seeds: int, prompts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = [rng.integers(-1, 2, prompts).astype(float) for _ in range(seeds)]
    ours, theirs = (score_test([s], 0.05, 300, 5) for s in (x, [-a for a in x]))
    assert (ours.won, ours.lost, ours.tied) == (theirs.lost, theirs.won, theirs.tied)
    assert ours.p == theirs.p and ours.mean == pytest.approx(-theirs.mean)
    assert (ours.low, ours.high) == pytest.approx((-theirs.high, -theirs.low))
    assert (ours.inner_low, ours.inner_high) == pytest.approx(
        (-theirs.inner_high, -theirs.inner_low)
    )


def test_one_cluster_is_scipys_bootstrap() -> None:
    x = np.random.default_rng(3).exponential(1.0, 60)
    low, high, *_ = mean_interval([[x]], 0.05, 20_000, 0, (0, 9))
    other = stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.02)
    assert (clustered_means([[x]], 50, 7) == clustered_means([[x]], 50, 7)).all()


@pytest.mark.fault(
    "statistics",
    "all prompts of a seed move together",
    "the interval widens",
)
def test_an_effect_of_the_seed_widens_the_interval() -> None:
    """Five seeds of 40 prompts that all move together are five measurements, not two hundred."""
    together = [np.full(40, shift) for shift in (0.3, -0.3, 0.2, -0.2, 0.1)]
    mixed = [np.concatenate(together)[at::5] for at in range(5)]
    wide, narrow = (score_test([s], 0.05, 4000, 0) for s in (together, mixed))
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)
    means = np.array([a[0] for a in together])
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * means.std() / 5**0.5, rel=0.1)


def test_groups_of_different_sizes_count_alike() -> None:
    found = clustered_means([[np.array([1.0]), np.zeros(9)]], 8000, 0)
    assert set(found) == {0.0, 0.5, 1.0} and found.mean() == pytest.approx(0.5, abs=0.02)
    two = clustered_means([[np.zeros(4)], [np.ones(7)]], 10, 0)
    assert (two == 0.5).all()


def test_what_is_always_the_same_has_a_width_by_exact_bounds() -> None:
    same = score_test([[np.zeros(100)]], 0.05, 200, 0)
    share = 1 - 0.025**0.01  # 0 of 100 differ: Clopper and Pearson's bound
    assert (same.low, same.high) == pytest.approx((-share, share))
    assert same.high == pytest.approx(stats.binomtest(0, 100).proportion_ci(0.95).high)
    assert (same.p, same.tied) == (1.0, 100)
    lost = score_test([[np.full(8, -1.0)]], 0.05, 200, 0)
    assert (lost.low, lost.p) == (-1.0, 2 / 2**8) and -1 < lost.high < 0
    single = score_test([[np.ones(1)]], 0.05, 200, 0)
    assert np.isnan([single.p, single.low, single.inner_high]).all()
    assert verdict(single, np.nan, 0.05, True, 0.1) == "inconclusive"
    nothing: list[Any] = [[], [[]], [[np.zeros(0)]]]
    for empty in nothing:
        with pytest.raises(ValueError, match="empty"):
            score_test(empty, 0.05, 200, 0)


def test_verdicts() -> None:
    def judged(x: list[float], margin: float = 0.1, p: float | None = None, **known: Any) -> str:
        test = score_test([[np.array(x)]], 0.05, 2000, 0)
        return verdict(test, test.p if p is None else p, 0.05, True, margin, **known)

    zeros = [0.0] * 200
    assert judged(zeros) == "identical"
    assert judged(zeros, informative=False) == "not informative"
    assert judged([*zeros, -1.0, 1.0]) == "equivalent"
    assert judged([-1.0] * 20 + zeros) == "worse"
    assert judged([1.0] * 20 + zeros) == "better"
    assert judged([-1.0] * 20 + zeros, informative=False) == "worse"  # it had something to lose
    assert judged([-1.0] * 6 + zeros, margin=0.1) == "worse (within margin)"
    assert judged([-1.0] * 20 + zeros, p=0.2) == "inconclusive"  # after Holm's adjustment
    assert judged([-1.0, 1.0, 0.0]) == "inconclusive"
    # more prompts lost than won, but little: the mean is not lower
    assert judged([-0.01] * 30 + [1.0] * 3) == "inconclusive"
    test = score_test([[np.array([-1.0] * 20 + zeros)]], 0.05, 500, 0)
    assert verdict(test, test.p, 0.05, False, 0.1) == "better"  # where lower is better


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=9
    )
)
def test_separate_windows_share_no_token(places: list[tuple[int, int, int]]) -> None:
    windows = pd.DataFrame(places, columns=["seed", "start", "tokens"])
    kept = separate_windows(windows)
    spans = sorted((r.start, r.start + r.tokens + 1) for r in kept.itertuples())
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    for row in windows.itertuples():  # each window that was left out overlaps one that was kept
        assert any(row.start < high and low < row.start + row.tokens + 1 for low, high in spans)
    again = separate_windows(windows.sample(frac=1, random_state=1))
    assert sorted(again["start"]) == sorted(kept["start"])


def test_a_series_counts_for_less() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=400)
    assert series_inflation(noise) < 1.4
    assert series_inflation(np.repeat(noise[:100], 4)) > 2.5
    assert series_inflation(np.repeat(noise[:4], 4)) == 1.0  # too few
    assert series_inflation(np.ones(50)) == 1.0


def test_margins() -> None:
    both = Margin(relative=0.05, absolute=2.0)
    assert (both.half_width(20), both.half_width(90)) == (1.0, 2.0)
    assert Margin.model_validate(5).half_width(8) == 5.0
    # 21 times exp(m) is 21.42
    assert Margin(relative=0.02).in_nats(21.0) == pytest.approx(np.log(1.02))


def study_of(suite: str = "perplexity", models: int = 1, **margin: Any) -> Study:
    task: dict[str, Any] = {"suite": suite}
    return parse_study(
        {
            "study": "check",
            "headline": "kivi-2",
            "models": {f"m{i}": {"source": "local", "path": "x"} for i in range(models)},
            "schemes": {"fp16": {"kind": "fp16"}, "kivi-2": {"kind": "kivi", "bits": 2}},
            "tasks": {"t": task},
            "statistics": {"margins": {suite: margin or {"relative": 0.05}}},
        }
    )


def texts(shift: float, offsets: list[int], windows: int = 30, model: str = "m0") -> Pair:
    """Perplexities of a text cut at some offsets, a seed each; kivi-2 loses `shift` nats."""
    rows, samples = [], []
    for scheme in ("fp16", "kivi-2"):
        for seed, offset in enumerate(offsets):
            losses = 3 + 0.3 * np.random.default_rng(0).normal(size=windows)
            if scheme == "kivi-2":
                losses = losses + shift + 0.005 * np.random.default_rng(1).normal(size=windows)
            key = {"model": model, "scheme": scheme, "task": "t", "suite": "perplexity"}
            facts = {"metric": "perplexity", "higher_is_better": False}
            value = float(np.exp(losses.mean()))
            rows.append({**key, **facts, "seed": seed, "value": value})
            samples += [
                {**key, "seed": seed, "sample": at, "score": loss, "row": None}
                | {"start": offset + 100 * at, "tokens": 99}
                for at, loss in enumerate(losses)
            ]
    return pd.DataFrame(rows), pd.DataFrame(samples)


@pytest.mark.fault(
    "statistics",
    "seeds that cut one text elsewhere",
    "counted once, marked as one text, no p over seeds",
)
def test_cuts_of_one_text_are_one_measurement() -> None:
    """Seeds that shift windows over the same text add nothing: the first one's windows count."""
    one, five = (
        compare_all(study_of(), *texts(0.01, offsets)).iloc[0]
        for offsets in ([0], [0, 13, 40, 77, 99])
    )
    assert (five.paired_by, five.pairs, five.note) == (
        "window",
        30,
        "one text: 30 of 150 windows share no token",
    )
    assert (one.sample_pairs, one.p_sample) == (five.sample_pairs, five.p_sample)
    assert (one.sample_ci_low, one.sample_ci_high) == (five.sample_ci_low, five.sample_ci_high)
    assert five.p == five.p_sample and five.ci_low == five.sample_ci_low
    assert np.isnan(one.p) and one.paired_by == "seed"  # one seed has no spread over seeds


def test_seeds_with_windows_of_their_own_are_paired() -> None:
    found = compare_all(study_of(), *texts(0.01, [0, 5000, 10_000])).iloc[0]
    assert (found.paired_by, found.pairs, found.sample_pairs, found.note) == ("seed", 3, 90, "")


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(0.2, "worse"), (-0.2, "better"), (0.02, "worse (within margin)"), (0.0, "equivalent")],
)
def test_where_lower_is_better(shift: float, expected: str) -> None:
    found = compare_all(study_of(), *texts(shift, [0, 50])).iloc[0]
    assert found.verdict == expected
    assert np.sign(found.difference) == (np.sign(shift) or np.sign(found.difference))
    # the interval in perplexity: the baseline's times exp of the interval in nats
    rows = texts(shift, [0])[1].pivot(index="sample", columns="scheme", values="score")
    x = (rows["kivi-2"] - rows["fp16"]).to_numpy()
    half = stats.t.ppf(0.975, 29) * x.std(ddof=1) / 30**0.5 * series_inflation(x) ** 0.5
    assert found.sample_ci_high == pytest.approx(found.baseline_mean * np.expm1(x.mean() + half))
    assert found.margin == pytest.approx(0.05 * found.baseline_mean)


def test_models_have_families_of_their_own() -> None:
    tables = [texts(0.1, [0, 50], model=name) for name in ("m0", "m1")]
    both = (pd.concat([t[i] for t in tables], ignore_index=True) for i in (0, 1))
    found = compare_all(study_of(models=2), *both)
    assert list(found["family"]) == ["m0 / task / perplexity", "m1 / task / perplexity"]
    assert set(found["family_size"]) == {1}
    assert (found["p_sample"] == found["p_sample_holm"]).all()


def scores(base: list[float], ours: list[float]) -> Pair:
    """A task of two seeds that ask half of the prompts each."""
    rows, samples = [], []
    for scheme, right in (("fp16", base), ("kivi-2", ours)):
        for seed in (0, 1):
            mine = right[seed::2]
            key = {"model": "m0", "scheme": scheme, "task": "t", "suite": "passkey"}
            facts = {"metric": "accuracy", "higher_is_better": True}
            rows.append({**key, **facts, "seed": seed, "value": 100 * float(np.mean(mine))})
            samples += [
                {**key, "seed": seed, "sample": at, "score": score}
                | dict.fromkeys(("row", "start", "tokens"))
                for at, score in enumerate(mine)
            ]
    return pd.DataFrame(rows), pd.DataFrame(samples)


@pytest.mark.fault(
    "statistics",
    "a baseline near chance or below its floor",
    "not informative",
)
def test_a_task_near_chance_tells_nothing() -> None:
    study = study_of("passkey", relative=0.05)
    low, none, one = ([1.0] * n + [0.0] * (100 - n) for n in (8, 0, 1))
    assert compare_all(study, *scores(low, low)).verdict.iloc[0] == "not informative"
    assert compare_all(study, *scores(none, none)).verdict.iloc[0] == "not informative"
    two = [1.0] * 6 + [0.0] * 94
    assert compare_all(study, *scores(low, two)).verdict.iloc[0] == "not informative"
    assert compare_all(study, *scores(low, one)).verdict.iloc[0] == "worse"  # what little there was
    half = [1.0] * 50 + [0.0] * 50
    assert compare_all(study, *scores(half, half)).verdict.iloc[0] == "identical"
    guess = study_of("passkey", relative=0.05, chance=45.0)
    assert compare_all(guess, *scores(half, half)).verdict.iloc[0] == "not informative"
    # a score far above the baseline's is no matter of chance
    assert compare_all(study, *scores(none, half)).verdict.iloc[0] == "better"


def test_a_margin_follows_the_baseline() -> None:
    many = [1.0, 1.0, 0, 0, 0, 0, 0, 0] * 125  # 25 points: 5 % of them are 1.25
    less = list(many)
    less[0] = less[1] = 0.0
    less[2] = 1.0
    table = compare_all(study_of("passkey", relative=0.05), *scores(many, less)).iloc[0]
    assert (table.margin, table.verdict) == (1.25, "equivalent")
    table = compare_all(study_of("passkey", relative=0.005), *scores(many, less)).iloc[0]
    assert (table.margin, table.verdict) == (0.125, "inconclusive")
