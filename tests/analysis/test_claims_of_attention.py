"""Claims about 8-bit attention of prompts, from tables of small studies."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from kvquant.analysis import claims_of_attention
from kvquant.analysis.claim_list import CLAIMS
from kvquant.analysis.claims import judge
from kvquant.analysis.evidence import NOT_ENOUGH, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED, Outcome
from kvquant.analysis.study_tables import Tables
from kvquant.study.config import Study
from tests.support.studies import LONG_CALLS, study_of
from tests.support.tables import job_table

SCHEMES: dict[str, dict[str, Any]] = {
    "fp16": {"kind": "fp16"},
    "fp16-8": {"kind": "fp16", "prompt_attention": "8-bit"},
    "fp8": {"kind": "fp8"},
    "nuq3": {"kind": "nuq", "bits": 3},
    "nuq3-8": {"kind": "nuq", "bits": 3, "prompt_attention": "8-bit"},
    "nuq2-8": {"kind": "nuq", "bits": 2, "prompt_attention": "8-bit"},
}
CASE: dict[str, Any] = {
    **{"shape": "7b-mha", "prompt": 65536, "answer": 8, "batch_size": 1, "energy": True},
    "schemes": ["nuq3", "nuq3-8"],
}
NONE = pd.DataFrame()


def study(case: dict[str, Any] | None = None) -> Study:
    return study_of(schemes=SCHEMES, tasks=LONG_CALLS, jobs={"cases": {"long": case or CASE}})


def of_jobs(asked: Study, **changed: Any) -> Tables:
    jobs = job_table(asked)
    for column, value in changed.items():
        jobs.loc[jobs.scheme == "nuq3-8", column] = value
    return Tables(asked, NONE, NONE, NONE, NONE, NONE, NONE, jobs)


def of_divergences(ours: float, theirs: float, seeds: int = 5) -> Tables:
    rows = [
        {"task": "ppl", "suite": "perplexity", "protocol": "B", "seed": seed, "scheme": name}
        | {"kl": value * (1 + 0.01 * seed), "model": "m"}
        for seed in range(seeds)
        for name, value in (("fp16-8", ours), ("fp8", theirs))
    ]
    return Tables(study(), pd.DataFrame(rows), NONE, NONE, NONE, NONE, NONE, NONE)


def test_twins_differ_in_the_attention_alone() -> None:
    asked = study()
    found = {name: asked.sixteen_bit_twin(name) for name in asked.schemes}
    assert found == dict.fromkeys(SCHEMES) | {"fp16-8": "fp16", "nuq3-8": "nuq3"}


@pytest.mark.parametrize(
    ("ours", "seeds", "verdict"),
    [(0.2, 5, SUPPORTED), (1.7, 5, NOT_SUPPORTED), (0.2, 3, NOT_ENOUGH)],
)
def test_divergence_is_that_of_an_fp8_cache_or_less(ours: float, seeds: int, verdict: str) -> None:
    outcome = claims_of_attention.divergence(of_divergences(ours, 1.0, seeds))
    assert outcome.verdict == verdict
    assert outcome.value == pytest.approx(ours)


def test_without_divergences_nothing_is_claimed() -> None:
    none = of_divergences(0.2, 1.0).evaluations.assign(protocol="A")
    tables = Tables(study(), none, NONE, NONE, NONE, NONE, NONE, NONE)
    assert claims_of_attention.divergence(tables).verdict == NOT_MEASURED


TIMES = {"first_token_ms_median": 80.0, "first_token_ms_p10": 79.0, "first_token_ms_p90": 81.0}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, SUPPORTED),
        ({"first_token_ms_p90": 99.0}, NOT_ENOUGH),  # the interval holds the bar
        ({"trials": 2}, NOT_ENOUGH),
        ({name: 2 * value for name, value in TIMES.items()}, NOT_SUPPORTED),
        ({"status": "oom"}, NOT_MEASURED),
    ],
)
def test_speed(changed: dict[str, Any], verdict: str) -> None:
    tables = of_jobs(study(), **TIMES)
    slower = tables.jobs.scheme == "nuq3"
    for name, value in TIMES.items():
        tables.jobs.loc[slower, name] = 1.25 * value
    for name, value in changed.items():
        tables.jobs.loc[~slower, name] = value
    outcome: Outcome = claims_of_attention.speed(tables)
    assert outcome.verdict == verdict
    if not changed:
        assert outcome.value == pytest.approx(1.25)


def test_energy_is_compared_with_the_same_cache() -> None:
    low = {f"joules_per_prompt_token{end}": 0.001 for end in ("", "_low", "_high")}
    assert claims_of_attention.energy(of_jobs(study(), **low)).verdict == SUPPORTED
    assert claims_of_attention.energy(of_jobs(study())).verdict == NOT_SUPPORTED
    estimated = of_jobs(study(), **low, source="estimated")
    assert claims_of_attention.energy(estimated).verdict == NOT_MEASURED


def test_short_prompts_say_nothing() -> None:
    asked = study(CASE | {"prompt": 1024})
    assert claims_of_attention.speed(of_jobs(asked, **TIMES)).verdict == NOT_MEASURED


def test_studies_without_8_bit_attention_leave_its_claims_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = {n: c for n, c in CLAIMS.items() if c.of_attention or n == "capacity"}
    monkeypatch.setattr("kvquant.analysis.claims.CLAIMS", kept)
    texts = [claim.text for claim in kept.values()]
    assert len(texts) == 4
    plain = {name: spec for name, spec in SCHEMES.items() if "prompt_attention" not in spec}
    without = study_of(schemes=plain, jobs={"cases": {"long": CASE | {"schemes": ["nuq3"]}}})
    for asked, expected in ((without, [CLAIMS["capacity"].text]), (study(), texts)):
        tables = Tables(asked, NONE, NONE, NONE, NONE, NONE, NONE, NONE)
        assert list(judge(tables)["claim"]) == expected


def test_every_task_counts() -> None:
    """Also one with few seeds or without a ratio, whatever its place."""
    tasks = {name: LONG_CALLS["ppl"] for name in ("ppl", "second")}
    asked = study_of(schemes=SCHEMES, tasks=tasks, jobs={"cases": {"long": CASE}})
    first = of_divergences(0.2, 1.0).evaluations
    few, exact = (of_divergences(0.1, theirs).evaluations for theirs in (1.0, 0.0))
    whole = first.assign(task="second")
    for other, verdict in (
        (whole, SUPPORTED),
        (few[few.seed == 0], NOT_ENOUGH),
        (few[few.seed < 2], NOT_ENOUGH),
        (exact, NOT_ENOUGH),
        (few[:0], NOT_ENOUGH),
    ):
        for parts in ((first, other.assign(task="second")), (other.assign(task="second"), first)):
            rows = pd.concat(parts, ignore_index=True)
            tables = Tables(asked, rows, NONE, NONE, NONE, NONE, NONE, NONE)
            assert claims_of_attention.divergence(tables).verdict == verdict


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, SUPPORTED),
        ({"case": "other"}, NOT_ENOUGH),  # not measured
        ({"status": "oom"}, NOT_ENOUGH),
        ({"trials": 2}, NOT_ENOUGH),
        ({"first_token_ms_p90": None, "joules_per_prompt_token_high": None}, NOT_ENOUGH),
    ],
)
def test_every_long_case_counts(changed: dict[str, Any], verdict: str) -> None:
    for names in (("a", "b"), ("b", "a")):
        cases = {name: CASE | {"prompt": 65536 if name == "a" else 131072} for name in names}
        asked = study_of(schemes=SCHEMES, tasks=LONG_CALLS, jobs={"cases": cases})
        joules = {f"joules_per_prompt_token{end}": 0.001 for end in ("", "_low", "_high")}
        found = of_jobs(asked, **TIMES, **joules).jobs
        slower = found.scheme == "nuq3"
        for name, value in TIMES.items():
            found.loc[slower, name] = 1.25 * value
        for column, value in changed.items():
            found.loc[(found.case == "b") & ~slower, column] = value
        tables = Tables(asked, NONE, NONE, NONE, NONE, NONE, NONE, found)
        assert claims_of_attention.speed(tables).verdict == verdict
        assert claims_of_attention.energy(tables).verdict == verdict


def test_a_case_without_energy_says_nothing_about_it() -> None:
    cases = {"plain": CASE | {"energy": False}, "long": CASE | {"prompt": 131072}}
    asked = study_of(schemes=SCHEMES, tasks=LONG_CALLS, jobs={"cases": cases})
    low = {f"joules_per_prompt_token{end}": 0.001 for end in ("", "_low", "_high")}
    assert claims_of_attention.energy(of_jobs(asked, **low)).verdict == SUPPORTED
