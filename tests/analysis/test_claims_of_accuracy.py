"""Claims about accuracy and size: what they say is read without the code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from kvquant.analysis import claims_of_accuracy
from kvquant.analysis.evidence import NOT_MEASURED, SUPPORTED
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
    assert outcome.value == "3.48 (most of 2 cases with random weights, from 16K)"
    assert (outcome.verdict, outcome.of_model) == (SUPPORTED, False)


def test_every_step_names_its_bits() -> None:
    outcome = claims_of_accuracy.ordering(tables(accuracy_tables(study())[0]))
    assert outcome.verdict == SUPPORTED
    assert all(f" {bits} bits +" in outcome.value for bits in (4, 3, 2))


def test_short_prompts_do_not_look_like_a_failure() -> None:
    values = accuracy_tables(study())[0]
    outcome = claims_of_accuracy.bits_per_element(tables(values))
    assert outcome.verdict == NOT_MEASURED
    assert outcome.value == "the longest prompt has 4,096 tokens (3.60 bits); defined from 16K"
    long = values.assign(tokens=16384 * values.samples)
    assert claims_of_accuracy.bits_per_element(tables(long)).verdict == SUPPORTED
