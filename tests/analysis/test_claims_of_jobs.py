"""Claims and tables of whole jobs. Also covers: analysis.job_tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis import claims_of_jobs, job_tables
from kvquant.analysis.evidence import NOT_ENOUGH, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED, Outcome
from kvquant.analysis.labels import TIMES, job_label
from kvquant.analysis.study_tables import Tables
from kvquant.study.config import Study
from kvquant.study.jobs import JobCase
from tests.support.studies import study_of
from tests.support.tables import job_table

OURS = "NUQ 3 bits, 1 % outliers over 16-bit cache, on GPU"
BUDGET: dict[str, Any] = {
    "shape": "7b-mha",
    "prompt": 16384,
    "answer": 512,
    "memory_gb": 40,
    "capacity": True,
    "energy": True,
    "schemes": ["fp16", "nuq3"],
}
GENERATE = BUDGET | {"memory_gb": None, "batch_size": 1, "decode": "generate", "energy": False}
CASES = {"budget": BUDGET, "generated": GENERATE | {"capacity": False}}
CLAIMS = ("capacity", "speed", "energy", "prefill_energy", "generate")


def study(cases: dict[str, Any] | None = None) -> Study:
    return study_of(jobs={"cases": CASES if cases is None else cases})


def tables(jobs: pd.DataFrame | None = None, asked: Study | None = None) -> Tables:
    """The tables of a study in which only whole jobs were measured."""
    none, asked = pd.DataFrame(), asked or study()
    return Tables(
        asked, none, none, none, none, none, none, job_table(asked) if jobs is None else jobs
    )


def judged(claim: str, **changed: Any) -> Outcome:
    """The outcome of a claim where our row has other values."""
    jobs = job_table(study())
    for column, value in changed.items():
        jobs.loc[jobs.scheme == "nuq3", column] = value
    outcome: Outcome = getattr(claims_of_jobs, claim)(tables(jobs))
    return outcome


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_about_one_gpu(claim: str) -> None:
    asked = study({name: case | {"gpus": 2} for name, case in CASES.items()})
    outcome: Outcome = getattr(claims_of_jobs, claim)(tables(job_table(asked), asked))
    assert outcome.measured == "not measured yet (section 'jobs': no record)"


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        ("capacity", f"5.00: 200,000 tokens over 40,000 ({OURS})"),
        (
            "speed",
            f"3.000 [2.941, 3.061] (7B MHA 16K + 512 in 40 GB: {OURS}, 10 prompts against 2)",
        ),
        ("energy", f"0.333 [0.327, 0.340] (7B MHA 16K + 512 in 40 GB: {OURS})"),
        ("prefill_energy", f"1.000 [0.980, 1.020] (7B MHA 16K + 512 in 40 GB: {OURS})"),
        (
            "generate",
            f"3.000 [2.941, 3.061] (7B MHA 1 {TIMES} 16K + 512, generate: {OURS})",
        ),
    ],
)
def test_claims_compare_with_the_better_fp16_cache(claim: str, value: str) -> None:
    outcome = judged(claim)
    assert outcome.verdict == SUPPORTED
    assert outcome.measured == value


@pytest.mark.parametrize(
    ("claim", "changed", "verdict"),
    [
        ("capacity", {"capacity_tokens": 150_000}, NOT_SUPPORTED),
        ("speed", {"trials": 3}, NOT_ENOUGH),
        ("speed", {"job_tokens_per_s_low": 9000.0}, NOT_ENOUGH),  # the interval holds the bar
        ("speed", {"job_tokens_per_s_low": 1.0, "job_tokens_per_s_high": 2.0}, NOT_SUPPORTED),
        ("energy", {"source": "estimated"}, NOT_MEASURED),
        ("energy", {"joules_per_token_low": 0.1, "joules_per_token_high": 0.2}, NOT_SUPPORTED),
        ("prefill_energy", {"joules_per_prompt_token_high": 0.03}, NOT_ENOUGH),
        ("generate", {"step_ms_n": 2}, NOT_ENOUGH),
        ("generate", {"trials": 1}, NOT_ENOUGH),
        ("capacity", {"status": "oom"}, NOT_SUPPORTED),
        ("speed", {"status": "oom"}, NOT_SUPPORTED),
        ("energy", {"status": "oom"}, NOT_SUPPORTED),
    ],
)
def test_verdicts(claim: str, changed: dict[str, Any], verdict: str) -> None:
    assert judged(claim, **changed).verdict == verdict


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_is_not_measured_has_no_verdict(claim: str) -> None:
    judge = getattr(claims_of_jobs, claim)
    asked = study_of()
    assert judge(tables(pd.DataFrame(), asked)).verdict == NOT_MEASURED
    other = study({"small": BUDGET | {"memory_gb": 24}})
    assert judge(tables(asked=other)).verdict == NOT_MEASURED


def test_without_a_16_bit_cache_there_is_no_ratio() -> None:
    jobs = job_table(study())
    jobs.loc[jobs.scheme == "fp16", "status"] = "oom"
    outcome = claims_of_jobs.speed(tables(jobs))
    assert outcome.verdict == NOT_MEASURED
    assert outcome.measured.startswith("out of memory with every 16-bit cache (7B MHA 16K + 512 in")


def test_tables_have_a_row_per_cache() -> None:
    text = job_tables.jobs(tables())
    assert text.count("7B MHA 16K + 512 in 40 GB") == 2
    assert "NUQ 3 bits" in text
    held = job_tables.capacity(tables())
    assert "200,000" in held and "210,000" in held
    joules = job_tables.energy(tables())
    assert ", generate" not in joules and "0.0396 to 0.0404" in joules


def test_two_devices_are_told_apart(tmp_path: Path) -> None:
    jobs = job_table(study())
    both = pd.concat([jobs, jobs.assign(device="other")], ignore_index=True)
    assert "device" in job_tables.jobs(tables(both))
    assert tables(both).on_one_device().jobs["device"].unique().tolist() == ["gpu"]


def test_without_the_headline_the_first_quantized_cache_counts() -> None:
    asked = study({"budget": BUDGET | {"schemes": ["fp16", "kivi-4"]}})
    outcome = claims_of_jobs.speed(tables(asked=asked))
    assert outcome.verdict == SUPPORTED
    assert "KIVI 4 bits over 16-bit cache, on GPU" in outcome.measured


def test_names_of_cases() -> None:
    case = JobCase(**BUDGET)
    assert job_label(case) == "7B MHA 16K + 512 in 40 GB"
    given = JobCase(**BUDGET | {"memory_gb": None, "batch_size": 4})
    assert job_label(given) == f"7B MHA 4 {TIMES} 16K + 512"


def test_several_gpus_are_told_with_how_answers_were_decoded() -> None:
    plain = CASES["generated"] | {"decode": "fastest"}
    asked = study({"one": plain, "two": plain | {"gpus": 2}})
    text = job_tables.jobs(tables(job_table(asked), asked))
    head = next(line for line in text.splitlines() if "decoded by" in line)
    assert "GPUs" in head and "GPUs" not in job_tables.jobs(tables())
    shown = [line for line in text.splitlines() if "7B MHA" in line]
    assert len(shown) == 4
    for line in shown:
        spread = "on 2 GPUs" in line
        assert ("from Python & 2 &" in line) is spread
        assert ("CUDA graph & 1 &" in line) is not spread


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, SUPPORTED),
        ({"case": "other"}, NOT_ENOUGH),  # not measured
        ({"status": "oom"}, NOT_SUPPORTED),
        ({"trials": 1}, NOT_ENOUGH),
        ({"step_ms_n": 2}, NOT_ENOUGH),
        ({"decode_tokens_per_s_low": 1.0, "decode_tokens_per_s": 900.0}, NOT_ENOUGH),
    ],
)
def test_every_case_of_generate_counts(changed: dict[str, Any], verdict: str) -> None:
    asked = study({"one": CASES["generated"], "two": CASES["generated"] | {"prompt": 4096}})
    jobs = job_table(asked)
    for column, value in changed.items():
        jobs.loc[(jobs.case == "two") & (jobs.scheme == "nuq3"), column] = value
    jobs = jobs[(jobs.case != "two") | ("case" not in changed)]
    assert claims_of_jobs.generate(tables(jobs, asked)).verdict == verdict


@pytest.mark.parametrize("claim", ["capacity", "speed", "energy", "prefill_energy"])
def test_another_case_does_not_hide_one_that_ran_out_of_memory(claim: str) -> None:
    asked = study({"one": BUDGET, "two": BUDGET | {"prompt": 8192}})
    jobs = job_table(asked)
    judge = getattr(claims_of_jobs, claim)
    assert judge(tables(jobs, asked)).verdict == SUPPORTED
    jobs.loc[(jobs.case == "one") & (jobs.scheme == "nuq3"), "status"] = "oom"
    assert judge(tables(jobs, asked)).verdict == NOT_SUPPORTED
