"""The names in tables, and the looks of schemes in figures.

Also covers: analysis.figures.style.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis.figures import style
from kvquant.analysis.labels import TIMES, case_label, device_label, job_label, labels_of
from kvquant.study.config import load_study, parse_study
from kvquant.study.jobs import JobCase
from tests.support.studies import study_of


def test_tables_have_names_where_they_had_keys(root: Path) -> None:
    labels = labels_of(load_study(root / "config/config.yaml"))
    workload = "p4096-b8-ragged"  # one of throughput and of energy, of other answers
    table = pd.DataFrame(
        [{"scheme": "nuq3-1pct", "task": "ruler", "workload": workload, "value": 1.0}]
    )
    shown = labels.of(table).iloc[0]
    assert shown.scheme == "NUQ 3 bits, 1 % outliers" and shown.task == "RULER"
    assert shown.workload == f"8 {TIMES} 4K tokens, ragged, 16 new" and shown.value == 1.0
    assert labels.of(table, energy=True).workload[0] == f"8 {TIMES} 4K tokens, ragged, 64 new"
    assert table.scheme[0] == "nuq3-1pct"  # the table itself stays
    assert labels.scheme("nuq3-1pct (PyTorch)") == "NUQ 3 bits, 1 % outliers (PyTorch)"
    assert labels.scheme("elsewhere") == "elsewhere"


def test_cases_are_named_by_shape_and_lengths() -> None:
    assert case_label("7b-mha", 1, 16384, 16384) == f"7B MHA 1 {TIMES} 16K"
    assert case_label("8b-gqa", 4, 1000, 3000) == f"8B GQA 4 {TIMES} 1,000, ragged"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({}, f"13B MHA 4 {TIMES} 4K + 64"),
        ({"gpus": 1}, f"13B MHA 4 {TIMES} 4K + 64"),
        ({"gpus": 2}, f"13B MHA 4 {TIMES} 4K + 64 on 2 GPUs"),
        ({"gpus": 4, "split": "heads"}, f"13B MHA 4 {TIMES} 4K + 64 on 4 GPUs by heads"),
        ({"memory_gb": 40.0}, f"13B MHA 4 {TIMES} 4K + 64 in 40 GB"),
        ({"memory_gb": 24.0, "gpus": 2}, f"13B MHA 4 {TIMES} 4K + 64 on 2 GPUs in 24 GB each"),
    ],
)
def test_cases_of_whole_jobs_are_told_apart(more: dict[str, Any], name: str) -> None:
    plain = {"shape": "13b-mha", "prompt": 4096, "answer": 64, "batch_size": 4}
    assert job_label(JobCase.model_validate({**plain, "schemes": ["fp16"], **more})) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("h100-80gb-hbm3", "H100 80GB HBM3"),
        ("a100-sxm4-40gb-mig-3g-20gb", "A100 SXM4 40GB MIG 3G 20GB"),
        ("tesla-t4", "Tesla T4"),
        ("cpu", "CPU"),
    ],
)
def test_devices_are_named_as_their_makers_do(key: str, name: str) -> None:
    assert device_label(key) == name


@pytest.mark.parametrize(
    "file",
    [
        "config",
        "quality",
        "ablation",
        "attention_gemma",
        "gemma",
        "two_gpus",
        "eight_gpus",
        "demo",
        "athena",
    ],
)
def test_every_scheme_has_a_look_of_its_own(root: Path, file: str) -> None:
    study = load_study(root / f"config/{file}.yaml")
    found = style.looks(study)
    assert list(found) == list(study.schemes) and len(set(found.values())) == len(found)
    assert found[study.baseline] == (style.BASELINE, style.MARKERS[0])
    colors: dict[str, set[str]] = {}
    for key, scheme in study.schemes.items():
        if scheme.quantizes:
            colors.setdefault(scheme.method(), set()).add(found[key][0])
    # a method has a color of its own, as long as there are markers for all of its schemes
    counts = Counter(scheme.method() for scheme in study.schemes.values())
    few = [found for name, found in colors.items() if counts[name] <= len(style.MARKERS)]
    assert all(len(of_method) == 1 for of_method in few)
    assert len(set().union(*few)) == len(few)


def test_many_schemes_of_one_method_look_different() -> None:
    raw: dict[str, Any] = {"fp16": {"kind": "fp16"}}
    raw |= {f"s{n}": {"kind": "turboquant", "bits": 3, "seed": n} for n in range(40)}
    study = study_of(schemes=raw, headline="s0")
    assert len(set(style.looks(study).values())) == 41


def test_looks_do_not_depend_on_what_is_measured(root: Path) -> None:
    """A study that measures less has the same looks; only its schemes decide them."""
    study = load_study(root / "config/config.yaml")
    raw = study.model_dump(mode="json")
    less = parse_study(
        raw
        | {
            "kernels": None,
            "append": None,
            "tasks": dict([next(iter(raw["tasks"].items()))]),
            "evaluation": {},
        }
    )
    assert style.looks(less) == style.looks(study)


def test_no_text_of_the_style_is_too_small() -> None:
    sizes = {k: v for k, v in style.STYLE.items() if k.endswith("size") and "font" in k}
    sizes |= {k: style.STYLE[k] for k in ("xtick.labelsize", "ytick.labelsize", "axes.labelsize")}
    assert sizes and min(float(v) for v in sizes.values()) >= 7


def test_names_break_at_commas() -> None:
    assert style.wrapped("NUQ 3 bits, 1 % outliers, no sink", 25) == (
        "NUQ 3 bits, 1 % outliers,\nno sink"
    )
    assert style.wrapped("KVQuant's procedure 3 bits", 12) == "KVQuant's\nprocedure 3\nbits"
