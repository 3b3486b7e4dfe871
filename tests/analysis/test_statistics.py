"""Paired tests against scipy, and the degenerate cases.

Also covers: analysis.comparison, analysis.paired, analysis.pareto.
"""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvquant.analysis.paired import grouped_test, holm, paired_test
from kvquant.analysis.pareto import dominated
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.errors import UserError
from kvquant.study.config import Study, parse_study


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), shift=st.floats(-2, 2), seed=st.integers(0, 10**6))
def test_equals_scipy(n: int, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, ours = rng.normal(size=n), rng.normal(size=n) + shift
    test = paired_test(ours - base, 0.5, 0.05)
    expected = stats.ttest_rel(ours, base)
    interval = expected.confidence_interval(0.95)
    assert test.p == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-12)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))
    lower = stats.ttest_1samp(ours - base, -0.5, alternative="greater").pvalue
    upper = stats.ttest_1samp(ours - base, 0.5, alternative="less").pvalue
    assert test.p_equivalence == pytest.approx(max(lower, upper), rel=1e-9, abs=1e-12)


def test_groups_by_hand() -> None:
    """Variances of the means 1/3 and 5/3; Satterthwaite: 2^2 / ((1/3)^2 / 2 + (5/3)^2 / 3)."""
    test = grouped_test([np.array([1.0, 2, 3]), np.array([2.0, 4, 6, 8])], 10.0, 0.05)
    error, freedom = np.sqrt(2) / 2, 4 / (1 / 18 + 25 / 27)
    assert (test.n, test.mean) == (7, 3.5)
    assert test.p == pytest.approx(2 * stats.t.sf(3.5 / error, freedom))
    assert test.high - test.mean == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    assert test.p_equivalence == pytest.approx(stats.t.cdf((3.5 - 10) / error, freedom))
    assert np.isnan(grouped_test([np.zeros(4), np.zeros(1)], 1.0, 0.05).p)
    with pytest.raises(ValueError, match="empty"):
        grouped_test([np.zeros(4), np.zeros(0)], 1.0, 0.05)


def test_holm_on_a_worked_example() -> None:
    adjusted = holm(np.array([0.01, 0.04, 0.03, 0.005, np.nan]))
    assert adjusted[:4] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(adjusted[4])


@pytest.mark.fault(
    "statistics",
    "differences that are all equal",
    "an exact p, never 0",
)
def test_without_spread_p_is_that_of_exchanged_signs() -> None:
    """Of n equal differences 2 of 2^n choices of signs are as extreme; 1 lies inside the margin."""
    same = paired_test(np.zeros(5), 0.1, 0.05)
    assert (same.p, same.p_equivalence, same.effect) == (1.0, 1 / 32, 0.0)
    constant = paired_test(np.full(5, 0.3), 0.1, 0.05)
    assert (constant.p, constant.low, constant.high) == pytest.approx((1 / 16, 0.3, 0.3))
    assert constant.p_equivalence == 1.0 and np.isposinf(constant.effect)
    exchanged = stats.permutation_test(
        (np.full(5, 0.3),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert constant.p == pytest.approx(exchanged.pvalue)
    assert 0 < paired_test(np.full(5000, 0.3), 0.1, 0.05).p < 1e-300
    single = paired_test(np.array([0.3]), 0.1, 0.05)
    assert np.isnan([single.p, single.low, single.high, single.p_equivalence]).all()
    with pytest.raises(ValueError, match="empty"):
        paired_test(np.array([]), 0.1, 0.05)
    for margin in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="margin"):
            paired_test(np.zeros(3), margin, 0.05)
    with pytest.raises(ValueError, match="finite"):
        paired_test(np.array([0.0, np.nan]), 0.1, 0.05)


@given(n=st.integers(2, 12), shift=st.floats(-1, 1), margin=st.floats(0.01, 2))
def test_tost_is_the_inner_interval_inside_the_margin(n: int, shift: float, margin: float) -> None:
    x = np.random.default_rng(n).normal(shift, 0.5, n)
    test = paired_test(x, margin, 0.05)
    inside = -margin < test.inner_low and test.inner_high < margin
    assert inside == (test.p_equivalence < 0.05)
    other = paired_test(-x, margin, 0.05)
    assert (other.low, other.high, other.p) == pytest.approx((-test.high, -test.low, test.p))


def test_dominance_with_missing_values() -> None:
    nan = np.nan
    costs = np.array([[1.0, 1.0], [2.0, 1.0], [0.5, 3.0], [nan, 2.0], [nan, nan]])
    assert dominated(costs).tolist() == [False, True, False, True, False]


def test_known_data_by_hand() -> None:
    # Student's sleep data (1908): extra hours under two drugs, ten patients.
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    test = paired_test(second - first, 3.0, 0.05)
    # published: t = 4.0621, df = 9, p = 0.00283, interval [0.7001, 2.4599]
    assert (test.n, test.mean) == (10, pytest.approx(1.58))
    assert test.p == pytest.approx(0.002833, abs=1e-6)
    assert (test.low, test.high) == pytest.approx((0.7001142, 2.4598858))
    assert test.effect == pytest.approx(4.0621277 / np.sqrt(10))  # t over the root of n
    # TOST by hand: t = (3 - 1.58) / 0.388959 with 9 degrees of freedom
    assert test.p_equivalence == pytest.approx(stats.t.sf(1.42 / 0.3889587, 9), rel=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition(p: list[float]) -> None:
    adjusted = holm(np.array(p))
    m = len(p)
    order = sorted(range(m), key=lambda i: p[i])
    for rank, i in enumerate(order):
        stepped = [(m - k) * p[order[k]] for k in range(rank + 1)]
        assert adjusted[i] == pytest.approx(min(1.0, max(stepped)))
    assert (adjusted >= np.array(p) - 1e-15).all()


def test_holm_and_tost_agree_with_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    weight = pytest.importorskip("statsmodels.stats.weightstats")
    rng = np.random.default_rng(1)
    p = rng.random(20) ** 2
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])
    x = rng.normal(0.1, 0.3, 9)
    expected = weight.DescrStatsW(x).ttost_mean(-0.5, 0.5)[0]
    assert paired_test(x, 0.5, 0.05).p_equivalence == pytest.approx(expected)


PLACE: dict[str, Any] = {"row": None, "start": None, "tokens": None}


def study_of(**margins: Any) -> Study:
    def task(name: str) -> dict[str, Any]:
        return {"suite": "ruler", "task": name, "length": 512, "samples": 4}

    return parse_study(
        {
            "study": "check",
            "models": {"tiny": {"source": "local", "path": "x"}},
            "schemes": {"fp16": {"kind": "fp16"}, "kivi-2": {"kind": "kivi", "bits": 2}},
            "headline": "kivi-2",
            "tasks": {"vt": task("vt"), "cwe": task("cwe")},
            "statistics": {"margins": margins or {"ruler": 5.0}},
        }
    )


def measured() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tasks, 5 seeds of 4 samples: kivi-2 loses one sample of each seed, but none of cwe's."""
    rows, samples = [], []
    for scheme in ("fp16", "kivi-2"):
        for task in ("vt", "cwe"):
            for seed in range(5):
                right = [1.0, 1.0, 1.0, float(seed % 2)]
                if scheme == "kivi-2" and task == "vt":
                    right[seed % 3] = 0.0
                key = {"model": "tiny", "scheme": scheme, "task": task, "suite": "ruler"}
                facts = {"metric": "score", "higher_is_better": True}
                rows.append({**key, **facts, "seed": seed, "value": 25 * sum(right)})
                samples += [
                    {**key, **PLACE, "seed": seed, "sample": at, "score": score}
                    for at, score in enumerate(right)
                ]
    return pd.DataFrame(rows), pd.DataFrame(samples)


def test_seeds_and_samples_are_paired_by_name_not_by_place() -> None:
    evaluations, samples = measured()
    table = compare_all(study_of(), evaluations, samples)
    assert len(table) == 3
    found = table.set_index(["level", "task"])
    vt, cwe, mean = (found.loc[k] for k in (("task", "vt"), ("task", "cwe"), ("suite", "ruler")))
    # degenerate over seeds: every seed loses exactly one of four
    assert (vt.difference, vt.p) == (-25.0, 1 / 16)
    assert np.isneginf(vt.effect_size) and vt.ci_low == vt.ci_high == -25.0
    # by samples, 5 of 20 are lost: 2 of 2^5 ways
    assert (vt.sample_pairs, vt.sample_difference) == (20, -25.0)
    assert (vt.won, vt.lost, vt.tied, vt.p_sample) == (0, 5, 15, 1 / 16)
    assert vt.sample_ci_low < -25 < vt.sample_ci_high < 0
    assert (vt.p_sample_holm, vt.verdict) == (1 / 8, "inconclusive")  # of a family of two
    assert (cwe.verdict, cwe.p, cwe.sample_difference) == ("identical", 1.0, 0.0)
    assert (mean.difference, mean.sample_pairs, mean.family_size) == (-12.5, 40, 1)
    shuffled = compare_all(
        study_of(),
        evaluations.sample(frac=1, random_state=0),
        samples.sample(frac=1, random_state=0),
    ).set_index(["level", "task"])
    columns = ["difference", "p", "p_holm", "sample_difference", "p_sample_holm", "verdict"]
    assert shuffled.loc[found.index, columns].equals(found[columns])


def test_holms_family_is_a_suite_of_a_level() -> None:
    evaluations, samples = measured()
    noise = np.random.default_rng(0).normal(0, 9, len(evaluations))
    table = compare_all(study_of(), evaluations.assign(value=evaluations["value"] + noise), samples)
    tasks = table[table["level"] == "task"]
    assert tasks["p_holm"].to_numpy() == pytest.approx(holm(tasks["p"].to_numpy()))
    mean = table[table["level"] == "suite"].iloc[0]
    assert mean.p_holm == mean.p


@pytest.mark.fault(
    "statistics",
    "fewer samples than the baseline, a sample twice, a missing pair",
    "refused, with the first key",
)
def test_a_missing_pair_and_a_missing_margin_are_told() -> None:
    evaluations, samples = measured()
    with pytest.raises(UserError, match=r"kivi-2/vt is not paired with the baseline on \['seed'\]"):
        compare_all(study_of(), evaluations.drop(10), samples)
    with pytest.raises(UserError, match=r"not paired with the baseline on \['seed', 'sample'\]"):
        compare_all(study_of(), evaluations, samples.drop(3))
    with pytest.raises(UserError, match="no margin for the suite 'ruler'"):
        compare_all(study_of(passkey=1.0), evaluations, samples)
    for column in PLACE:
        with pytest.raises(UserError, match=rf"no column '{column}': `aggregate` again"):
            compare_all(study_of(), evaluations, samples.drop(columns=column))
    fewer = samples[(samples["scheme"] != "kivi-2") | (samples["sample"] < 3)]
    with pytest.raises(UserError, match=r"kivi-2/vt .*: 15 against 20, the first alone is seed 0"):
        compare_all(study_of(), evaluations, fewer)
    twice = pd.concat([samples, samples.iloc[[45]]], ignore_index=True)
    with pytest.raises(UserError, match=r"kivi-2/vt is there twice \(seed 1, sample 1\)"):
        compare_all(study_of(), evaluations, twice)


def test_an_unfinished_scheme_has_no_mean_over_a_suite() -> None:
    """Its mean would be over other tasks than the baseline's."""
    evaluations, samples = (
        pd.concat([table, table[table["task"] == "vt"].assign(task="fwe")], ignore_index=True)
        for table in measured()
    )
    whole = compare_all(study_of(), evaluations, samples)
    assert (whole["level"] == "suite").sum() == 1
    evaluations, samples = (
        table[(table["scheme"] != "kivi-2") | (table["task"] != "fwe")]
        for table in (evaluations, samples)
    )
    table = compare_all(study_of(), evaluations, samples)
    assert sorted(table["task"]) == ["cwe", "vt"] and set(table["level"]) == {"task"}


@pytest.mark.fault(
    "statistics",
    "an unfinished study, the baseline's results of a task missing or no others there",
    "that task is not compared, what can be compared is, and figures without any say so",
)
def test_what_the_baseline_has_not_answered_yet_is_not_compared() -> None:
    evaluations, samples = (
        pd.concat([table, table[table["task"] == "vt"].assign(task="fwe")], ignore_index=True)
        for table in measured()
    )
    evaluations, samples = (
        table[(table["scheme"] != "fp16") | (table["task"] != "fwe")]
        for table in (evaluations, samples)
    )
    table = compare_all(study_of(), evaluations, samples)
    assert sorted(table["task"]) == ["cwe", "vt"] and set(table["level"]) == {"task"}
    for alone in (["fp16"], ["kivi-2"]):
        mine = (t[t["scheme"].isin(alone)] for t in (evaluations, samples))
        table = compare_all(study_of(), *mine)
        assert table.empty and {"level", "suite", "task", "scheme"} <= set(table)


def drawn(seeds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tasks of 6 rows of which each seed draws 4; kivi-2 loses more of later rows."""
    rows, samples = [], []
    for scheme in ("fp16", "kivi-2"):
        for number, task in enumerate(("vt", "cwe")):
            for seed in range(seeds):
                picked = [(seed + at) % 6 for at in range(4)]
                scores = [
                    0.9 - (scheme == "kivi-2") * (0.1 * row + 0.01 * number) for row in picked
                ]
                key = {"model": "tiny", "scheme": scheme, "task": task, "suite": "ruler"}
                facts = {"metric": "score", "higher_is_better": True}
                rows.append({**key, **facts, "seed": seed, "value": 100 * float(np.mean(scores))})
                samples += [
                    {**key, **PLACE, "seed": seed, "sample": at, "score": score, "row": row}
                    for at, (row, score) in enumerate(zip(picked, scores, strict=True))
                ]
    return pd.DataFrame(rows), pd.DataFrame(samples)


@pytest.mark.fault(
    "statistics",
    "twice the seeds over the same rows",
    "nothing changes",
)
def test_rows_that_seeds_share_count_once() -> None:
    """Twice the seeds draw the same rows again: nothing is more certain for it."""
    few, many = (compare_all(study_of(), *drawn(seeds)) for seeds in (6, 12))
    numbers = ["difference", "ci_low", "ci_high", "p", "p_equivalence", "pairs", "sample_pairs"]
    numbers += ["won", "lost", "p_sample", "sample_ci_low", "sample_ci_high", "verdict"]
    pd.testing.assert_frame_equal(few[numbers], many[numbers])
    assert set(few["paired_by"]) == {"row"}
    vt = few.set_index("task").loc["vt"]
    expected = paired_test(-10.0 * np.arange(6), 5.0, 0.05)
    assert (vt.pairs, vt.difference, vt.p) == (6, pytest.approx(-25.0), pytest.approx(expected.p))
    assert (vt.baseline_mean, vt["mean"]) == pytest.approx((90.0, 65.0))
    suite = few.set_index("task").loc["ruler"]
    assert (suite.pairs, suite.difference) == (12, pytest.approx(-25.5))
    assert suite.p < vt.p
