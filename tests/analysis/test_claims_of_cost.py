"""Claims about cost: what each of them is judged from, and what it says where nothing is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis import claims, claims_of_cost
from kvquant.analysis.evidence import NOT_ENOUGH, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED
from kvquant.analysis.labels import TIMES
from kvquant.analysis.study_tables import Tables
from kvquant.study.config import Study
from tests.support.studies import study_of
from tests.support.tables import accuracy_tables, timed_tables

ENDS = ("over_ours_p10", "over_ours_median", "over_ours_p90")
SIDES = {"fp16": 1.02, "reference": 1.4}


def study(**changed: Any) -> Study:
    schemes: dict[str, Any] = {
        "fp16": {"kind": "fp16"},
        "nuq3": {"kind": "nuq", "bits": 3},
        "reference": {"kind": "kvquant-ref", "bits": 3},
    }
    return study_of(schemes=schemes, gpus=1, **changed)


def kernels(**changed: Any) -> pd.DataFrame:
    """A prefill of two shapes in five rounds; the second is 0.01 slower over the first."""
    rows = []
    for shape, less in (("7b-mha", 0.0), ("8b-gqa", 0.01)):
        for side, ratio in SIDES.items():
            row: dict[str, Any] = {"device": "gpu", "case": shape, "shape": shape, "side": side}
            row |= {"scheme": "nuq3", "batch": 1, "tokens": 16384, "all_tokens": 16384}
            row |= {"measure": "prefill", "over_ours_n": 5, "over_ours_median": ratio - less}
            row |= {"over_ours_p10": ratio - less - 0.02, "over_ours_p90": ratio - less + 0.02}
            rows.append(row | changed)
    return pd.DataFrame(rows)


def tables(timed: pd.DataFrame | None = None, asked: Study | None = None) -> Tables:
    """The tables of a study in which nothing but kernels was timed."""
    none = pd.DataFrame()
    perf = pd.DataFrame(columns=["device", "model", "scheme", "workload", "rep", "prefill_ratio"])
    timed = kernels() if timed is None else timed
    return Tables(asked or study(), none, perf, none, none, none, none, none, timed)


def test_without_throughput_prefill_is_judged_from_kernels() -> None:
    outcome = claims_of_cost.prefill(tables())
    where = f"8B GQA 1 {TIMES} 16K, random weights, the worst workload"
    assert outcome.measured == f"1.010 [0.990, 1.030] ({where})"
    assert (outcome.evidence, outcome.device) == ("5 rounds", "gpu")
    assert (outcome.value, outcome.low, outcome.high) == pytest.approx((1.01, 0.99, 1.03))
    assert outcome.verdict == SUPPORTED
    slower = claims_of_cost.over_reference(tables())
    assert slower.measured == f"1.390 [1.370, 1.410] ({where})" and slower.verdict == NOT_SUPPORTED


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"over_ours_p10": 0.97}, NOT_ENOUGH),  # the interval holds the bar
        (dict(zip(ENDS, (0.9, 0.93, 0.95), strict=True)), NOT_SUPPORTED),
        ({"over_ours_n": 2}, NOT_ENOUGH),
        ({"measure": "pack"}, NOT_MEASURED),
        ({"scheme": "other"}, NOT_MEASURED),
        ({"over_ours_median": None}, NOT_MEASURED),
    ],
)
def test_verdicts_from_kernels(changed: dict[str, Any], verdict: str) -> None:
    assert claims_of_cost.prefill(tables(kernels(**changed))).verdict == verdict


def test_nothing_timed_says_where_it_would_be() -> None:
    for judge in (claims_of_cost.prefill, claims_of_cost.over_reference):
        outcome = judge(tables(pd.DataFrame()))
        assert outcome.verdict == NOT_MEASURED
        assert "'throughput' and 'kernels'" in outcome.measured
    on_cpu = claims_of_cost.prefill(tables(asked=study().model_copy(update={"gpus": 0})))
    assert on_cpu.verdict == NOT_MEASURED and "defined for a GPU" in on_cpu.measured


def test_what_is_of_a_shape_is_of_no_model() -> None:
    """Models of random weights speak for none of the study's models, and are shown once."""
    two = {name: {"source": "local", "path": name} for name in ("one", "two")}
    asked = study(models=two)
    evaluations, tests = accuracy_tables(asked)[0], pd.DataFrame()
    found = tables(asked=asked)
    table = claims.judge(
        Tables(asked, evaluations, found.perf, tests, tests, tests, tests, tests, found.kernels)
    )
    rows = table[table.claim == "Prefill at fp16 speed"]
    assert rows.model.to_list() == ["any"]
    assert table[table.claim == "Quantization is cheap"].model.to_list() == ["one", "two"]


def test_a_definition_names_the_headline_scheme_and_stands_alone() -> None:
    """Rows are read one by one, so none refers to another or to "the headline scheme"."""
    asked = study()
    found = tables(asked=asked)
    evaluations, none = accuracy_tables(asked)[0], pd.DataFrame()
    table = claims.judge(
        Tables(asked, evaluations, found.perf, none, none, none, none, none, found.kernels)
    )
    named = table.definition.str.contains("NUQ 3 bits, 1 % outliers", regex=False)
    assert table.claim[~named].to_list() == [
        "Loss grows as bits fall",
        "Half of the loss of KVQuant's procedure at equal bits",
    ]
    text = " ".join([*table.definition, *table.measured])
    for words in ("headline", "{", "the same caches", "the same jobs", "in this study", " a call"):
        assert words not in text, words
    assert table.claim.is_unique and "Energy per token at equal batch falls by 45 %" in set(
        table.claim
    )


def test_missing_records_are_named_by_their_section() -> None:
    for judge, section in (
        (claims_of_cost.energy, "energy"),
        (claims_of_cost.append, "append"),
        (claims_of_cost.quantize_share, "throughput"),
    ):
        outcome = judge(tables(pd.DataFrame()))
        assert outcome.measured == f"not measured yet (section '{section}': no record)"
        assert outcome.verdict == NOT_MEASURED


WORKLOADS = {"workloads": {n: {"prompt": 64, "batch_size": 2, "answer": 4} for n in ("a", "b")}}
PARTS: list[tuple[str, dict[str, Any], str]] = [
    ("b", {}, SUPPORTED),
    ("b", {"model": None}, NOT_ENOUGH),  # not measured
    ("b", {"scheme_prefill_ms_p90": 130.0, "scheme_prefill_ms_median": 99.0}, NOT_ENOUGH),
    ("b", {"scheme_rounds": 3}, NOT_ENOUGH),
    ("b", {"prefill_ratio": None, "scheme_status": "oom"}, NOT_SUPPORTED),
    ("ab", {"prefill_ratio": None, "scheme_status": "oom"}, NOT_SUPPORTED),
    ("b", {"prefill_ratio": None, "scheme_status": "oom", "base_status": "oom"}, SUPPORTED),
    ("b", {"prefill_ratio": None, "base_status": "oom"}, SUPPORTED),
]


@pytest.mark.fault(
    "records",
    "a workload that is missing, ran out of memory with our cache alone or has few rounds",
    "no claim about the worst workload is supported",
)
@pytest.mark.parametrize(("where", "changed", "verdict"), PARTS)
def test_every_workload_counts(where: str, changed: dict[str, Any], verdict: str) -> None:
    asked = study(throughput=WORKLOADS, energy=WORKLOADS)
    perf, used = timed_tables(asked)
    perf = perf.assign(scheme_status="ok", base_status="ok", prefill_ratio=1.02)
    ends = {"median": 98.0, "p10": 97.0, "p90": 99.0}
    perf = perf.assign(**{f"scheme_prefill_ms_{end}": value for end, value in ends.items()})
    chosen = perf.workload.isin(list(where)) & (perf.scheme == asked.headline)
    for column, value in changed.items():
        perf.loc[chosen, column] = value
    none = pd.DataFrame()
    perf = perf[perf.model.notna()]
    found = Tables(asked, none, perf, used, none, none, none, none, kernels())
    assert claims_of_cost.prefill(found).verdict == verdict
    spread = {"median": 5.0, "p10": 4.9, "p90": 5.1}
    cheap = perf.assign(quantize_share=perf.prefill_ratio.astype(float) * 0.1)
    cheap = cheap.assign(**{f"scheme_quantize_ms_{end}": v for end, v in spread.items()})
    share = claims_of_cost.quantize_share(replace(found, perf=cheap)).verdict
    if {"model", "scheme_rounds"} & set(changed):
        assert share == NOT_ENOUGH


def test_energy_needs_every_workload_by_a_counter() -> None:
    asked = study(throughput=WORKLOADS, energy=WORKLOADS)
    perf, used = timed_tables(asked)
    used = used.assign(energy_ratio=0.5, energy_ratio_low=0.49, energy_ratio_high=0.51)
    none = pd.DataFrame()
    whole = Tables(asked, none, perf, used, none, none, none, none, none)
    assert claims_of_cost.energy(whole).verdict == SUPPORTED
    second = used.workload == "b"
    wide = used.assign(energy_ratio_high=used.energy_ratio_high.mask(second, 0.7))
    for part in (
        used[~second],
        used[~second | (used.rep == 0)] if used.rep.nunique() > 1 else used[~second],
        used.assign(source=used.source.mask(second, "estimated")),
        used.assign(scheme_trials=used.scheme_trials.mask(second, 2)),
        wide.assign(energy_ratio=wide.energy_ratio.mask(second, 0.495)),
    ):
        assert claims_of_cost.energy(replace(whole, energy=part)).verdict == NOT_ENOUGH


def test_every_case_of_kernels_counts() -> None:
    cases = {
        shape: {"shape": shape, "tokens": 16384, "measure": ["prefill"]}
        for shape in ("7b-mha", "8b-gqa")
    }
    asked = study(kernels={"cases": cases})
    timed = kernels().assign(role="fp16", status="ok")
    ours = timed[timed.side == "fp16"].assign(
        role="ours", side="nuq3", over_ours_median=None, over_ours_p10=None, over_ours_p90=None
    )
    whole = pd.concat([timed, ours], ignore_index=True)
    assert claims_of_cost.prefill(tables(whole, asked)).verdict == SUPPORTED
    lacking = claims_of_cost.prefill(tables(whole[whole.case != "8b-gqa"], asked))
    assert lacking.verdict == NOT_ENOUGH
    assert lacking.measured.endswith("not measured yet: 8b-gqa")
    lost = (whole.case == "8b-gqa") & (whole.role == "ours")
    failed = whole.assign(status=whole.status.mask(lost, "oom"))
    failed.loc[failed.case == "8b-gqa", list(ENDS)] = None
    outcome = claims_of_cost.prefill(tables(failed, asked))
    assert outcome.verdict == NOT_SUPPORTED
    assert outcome.measured.startswith("out of memory with the quantized cache (8B GQA")
