"""Claims about accuracy and size: what they say is read without the code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis import claims_of_accuracy
from kvquant.analysis.evidence import NOT_ENOUGH, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.study_tables import Tables
from kvquant.study.config import Study
from tests.support.studies import study_of
from tests.support.tables import accuracy_tables


def study() -> Study:
    kinds: dict[str, Any] = {f"nuq{bits}": {"kind": "nuq", "bits": bits} for bits in (4, 3, 2)}
    return study_of(schemes={"fp16": {"kind": "fp16"}, **kinds}, seeds=[*range(5)])


def tables(evaluations: pd.DataFrame) -> Tables:
    none = pd.DataFrame()
    return Tables(study(), evaluations, none, none, none, none, none, none)


def test_caches_of_random_weights_tell_the_size_of_long_prompts() -> None:
    """A model that is made for short prompts does not leave the claim unmeasured."""
    head = study().headline
    kernels = pd.DataFrame(
        {
            "case": ["short", "one", "other", "one"],
            "side": [head, head, head, "fp16"],
            "tokens": [1024, 16384, 16384, 16384],
            "bits_per_element": [4.2, 3.46, 3.48, 16.0],
        }
    )
    values = tables(accuracy_tables(study())[0])
    outcome = claims_of_accuracy.bits_per_element(replace(values, kernels=kernels))
    assert outcome.measured == "3.48 (most of 2 cases with random weights, from 16K)"
    assert (outcome.verdict, outcome.of_model) == (SUPPORTED, False)


def test_every_step_names_its_bits() -> None:
    outcome = claims_of_accuracy.ordering(tables(accuracy_tables(study())[0]))
    assert outcome.verdict == SUPPORTED
    assert all(f" {bits} bits +" in outcome.measured for bits in (4, 3, 2))


def losses(**schemes: tuple[float, float]) -> Tables:
    """Perplexities and bits of schemes of five seeds, over those of fp16."""
    kinds: dict[str, Any] = {
        "nuq4": {"kind": "nuq", "bits": 4, "outliers": 0.01},
        "nuq3": {"kind": "nuq", "bits": 3, "outliers": 0.01},
        "nuq3-plain": {"kind": "nuq", "bits": 3, "outliers": 0.0},
        "allocated-4": {"kind": "allocated", "bits": 4.4},
        "allocated-3": {"kind": "allocated", "bits": 3.4},
        "layers-equal": {"kind": "allocated", "bits": 3.4, "allocation": "layer"},
    }
    named = {name.replace("_", "-"): values for name, values in schemes.items()}
    chosen = {name: kinds[name] for name in named}
    asked = study_of(schemes={"fp16": {"kind": "fp16"}, **chosen}, seeds=[*range(5)])
    rows = [
        {"model": "m", "scheme": name, "task": "ppl", "suite": "perplexity", "protocol": "B"}
        | {"seed": seed, "value": 20 + seed + lost * (1 + seed / 100), "bits_per_element": bits}
        | {"samples": 140}
        for name, (lost, bits) in {"fp16": (0.0, 16.0), **named}.items()
        for seed in range(5)
    ]
    none = pd.DataFrame()
    return Tables(asked, pd.DataFrame(rows), none, none, none, none, none, none)


def test_loss_is_compared_at_no_more_bits_and_between_plain_schemes() -> None:
    outcome = claims_of_accuracy.half_the_loss(
        losses(
            nuq4=(0.4, 5.0),
            nuq3=(1.5, 4.0),
            nuq3_plain=(9.0, 3.9),
            allocated_4=(0.16, 4.9),
            allocated_3=(0.6, 3.9),
            layers_equal=(0.1, 3.8),
        )
    )
    assert outcome.verdict == SUPPORTED and outcome.evidence == "5 seeds of 140 windows or more"
    assert "0.40 [0.40, 0.40] with 4.90 for 5.00 bits, 0.40 [0.40, 0.40] with 3.90 for 4.00" in (
        outcome.measured
    )


def test_the_loss_at_the_worst_width_decides() -> None:
    values = losses(
        nuq4=(0.4, 5.0), nuq3=(1.5, 4.0), allocated_4=(0.3, 4.9), allocated_3=(0.6, 3.9)
    )
    outcome = claims_of_accuracy.half_the_loss(values)
    assert outcome.verdict == NOT_SUPPORTED
    assert (outcome.cache, outcome.baseline) == (
        "Allocated codes 4.4 bits", "NUQ 4 bits, 1 % outliers"
    )  # fmt: skip
    assert [outcome.low, outcome.value, outcome.high] == pytest.approx([0.75] * 3)
    assert outcome.workload == "Essays, protocol B (the worst of 2)"


def test_more_bits_are_no_comparison() -> None:
    values = losses(nuq3=(1.5, 4.0), allocated_3=(0.6, 4.1))
    assert claims_of_accuracy.half_the_loss(values).verdict == NOT_MEASURED
    assert claims_of_accuracy.half_the_loss(losses(nuq3=(1.5, 4.0))).verdict == NOT_MEASURED


@pytest.mark.parametrize("theirs", [-0.05, 0.0])
@pytest.mark.parametrize("ours", [-0.2, 0.0, 0.6])
def test_there_is_no_half_of_what_was_not_lost(theirs: float, ours: float) -> None:
    """A ratio to a gain would be negative, and so below the bar whatever was lost."""
    outcome = claims_of_accuracy.half_the_loss(losses(nuq3=(theirs, 4.0), allocated_3=(ours, 3.9)))
    assert outcome.verdict == NOT_ENOUGH
    assert "no ratio, as NUQ lost nothing in 5 of 5 seeds, with 3.90 for 4.00" in outcome.measured


def test_a_missed_width_fails_beside_one_without_loss() -> None:
    values = losses(
        nuq4=(-0.1, 5.0), nuq3=(1.5, 4.0), allocated_4=(-0.2, 4.9), allocated_3=(0.9, 3.9)
    )
    assert claims_of_accuracy.half_the_loss(values).verdict == NOT_SUPPORTED


def test_seeds_that_only_one_side_has_are_no_pairs() -> None:
    values = losses(nuq3=(1.5, 4.0), allocated_3=(0.6, 3.9))
    rows = values.evaluations
    late, ours, theirs = rows.seed >= 3, rows.scheme == "allocated-3", rows.scheme == "nuq3"
    none = replace(values, evaluations=rows[~(late & ours) & ~(~late & theirs)])
    outcome = claims_of_accuracy.half_the_loss(none)
    assert (outcome.verdict, outcome.n) == (NOT_ENOUGH, 0)
    some = replace(values, evaluations=rows[~(late & ours)])
    assert claims_of_accuracy.half_the_loss(some).n == 3


def test_short_prompts_do_not_look_like_a_failure() -> None:
    values = accuracy_tables(study())[0]
    outcome = claims_of_accuracy.bits_per_element(tables(values))
    assert outcome.verdict == NOT_MEASURED
    assert outcome.measured == "the longest prompt has 4,096 tokens (3.60 bits); defined from 16K"
    long = values.assign(tokens=16384 * values.samples)
    assert claims_of_accuracy.bits_per_element(tables(long)).verdict == SUPPORTED


def seven(**tasks: tuple[float, float, float]) -> Tables:
    """Tests of Llama-2-7B's perplexity with (difference, low, high), and of passkeys."""
    named = {
        f"ppl{n}": {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": n}
        for n in (1, 2)
    }
    asked = study_of(
        models={"llama-2-7b": {"source": "local", "path": "x"}}, tasks=named, seeds=[*range(5)]
    )
    rows = [
        {"model": "llama-2-7b", "level": "task", "suite": "perplexity", "task": task}
        | {"scheme": asked.headline, "difference": values[0], "ci_low": values[1]}
        | {"ci_high": values[2], "paired_by": "seed"}
        for task, values in tasks.items()
    ]
    scores = pd.DataFrame(
        [{"scheme": asked.headline, "task": t, "seed": s} for t in tasks for s in range(5)]
    )
    none = pd.DataFrame()
    return Tables(asked, scores, none, none, pd.DataFrame(rows), none, none, none)


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ((0.04, 0.03, 0.06), SUPPORTED),
        ((0.04, -0.3, 0.4), NOT_ENOUGH),  # its interval holds the bar, the larger loss's does not
        ((float("nan"),) * 3, NOT_ENOUGH),
        (None, NOT_ENOUGH),  # not measured
    ],
)
def test_every_perplexity_task_counts(second: tuple[float, ...] | None, verdict: str) -> None:
    tasks: dict[str, Any] = {"ppl1": (0.05, 0.04, 0.06)}
    outcome = claims_of_accuracy.loss_on_7b(seven(**tasks | ({"ppl2": second} if second else {})))
    assert outcome.verdict == verdict


@pytest.mark.fault(
    "records",
    "a task of a claim about every task that is not measured yet",
    "the claim is not supported",
)
def test_a_missing_passkey_task_leaves_the_claim_open() -> None:
    tasks = {f"passkey{n}": {"suite": "passkey", "length": n, "samples": 200} for n in (200, 400)}
    asked = study_of(
        schemes={"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3}},
        tasks=tasks,
        seeds=[*range(5)],
    )
    evaluations, samples = accuracy_tables(asked)
    rows = compare_all(asked, evaluations, samples).assign(verdict="equivalent")
    none = pd.DataFrame()
    whole = Tables(asked, evaluations, none, none, rows, none, none, none)
    assert claims_of_accuracy.passkey(whole).verdict == SUPPORTED
    some = {"evaluations": evaluations[evaluations.task == "passkey200"]}
    part = replace(whole, **some, tests=rows[rows.task == "passkey200"])
    outcome = claims_of_accuracy.passkey(part)
    assert outcome.verdict == NOT_ENOUGH
    assert "not measured yet: " in outcome.measured


def test_a_missing_width_leaves_the_order_open() -> None:
    tasks = {
        f"ppl{n}": {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": n}
        for n in (1, 2)
    }
    kinds: dict[str, Any] = {f"nuq{bits}": {"kind": "nuq", "bits": bits} for bits in (4, 3, 2)}
    asked = study_of(schemes={"fp16": {"kind": "fp16"}, **kinds}, tasks=tasks, seeds=[*range(5)])
    rows, none = accuracy_tables(asked)[0], pd.DataFrame()
    missing = (rows.task == "ppl2") & (rows.scheme == "nuq2")
    for part, verdict in ((rows, SUPPORTED), (rows[~missing], NOT_ENOUGH)):
        found = Tables(asked, part, none, none, none, none, none, none)
        assert claims_of_accuracy.ordering(found).verdict == verdict
