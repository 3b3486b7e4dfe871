"""The figure of what fits in memory: what was found, the formula's value, and the multiple."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvquant.analysis.figure_list import FIGURES
from kvquant.analysis.figures import capacity
from kvquant.analysis.figures.style import WIDTH
from kvquant.analysis.labels import TIMES
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from kvquant.study.config import Study
from kvquant.study.jobs import JobCase
from tests.support.studies import study_of
from tests.support.tables import job_table

CASE: dict[str, Any] = {
    "shape": "7b-mha", "prompt": 16384, "answer": 64, "memory_gb": 40, "capacity": True,
    "schemes": ["fp16", "nuq3"],
}  # fmt: skip
CASES = {"held": CASE, "longest": CASE | {"capacity": False, "context": True, "batch_size": 1}}


def drawn(asked: Study, folder: Path, **changed: Any) -> Any:
    table = job_table(asked).assign(**changed)
    table.loc[table.case == "longest", "context_tokens"] = 100_000.0
    table.loc[table.case == "longest", "capacity_tokens"] = None
    write_table(table, folder / "jobs.parquet")
    return capacity.draw(asked, folder)


def test_each_search_is_a_panel_with_the_formula_and_the_multiple(tmp_path: Path) -> None:
    figure = drawn(study_of(jobs={"cases": CASES}), tmp_path)
    assert figure.get_size_inches()[0] == WIDTH
    held, longest = figure.axes
    assert "held at once" in held.get_xlabel() and "longest prompt" in longest.get_xlabel()
    places = {label.get_text(): at for at, label in zip(
        held.get_yticks(), held.get_yticklabels(), strict=True)}  # fmt: skip
    found = {
        (line.get_ydata()[0], line.get_marker() == "|"): line.get_xdata()[0] for line in held.lines
    }
    ours, base = places["NUQ 3 bits, 1 % outliers"], places["16-bit cache"]
    assert found[ours, False] == 200_000 and found[base, False] == 40_000
    assert found[ours, True] == found[base, True] == 210_000
    said = [text.get_text() for text in held.texts]
    assert said == [f"5.0{TIMES}", "7B MHA 16K in 40 GB"]
    assert [t.get_text() for t in longest.texts] == [f"1.0{TIMES}", "7B MHA in 40 GB"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "7B MHA 16K in 40 GB"),
        ({"memory_gb": None}, "7B MHA 16K in 80 GB"),
        ({"gpus": 2}, "7B MHA 16K on 2 GPUs in 40 GB each"),
        ({"gpus": 2, "split": "heads"}, "7B MHA 16K on 2 GPUs by heads in 40 GB each"),
        ({"gpus": 2, "memory_gb": None}, "7B MHA 16K on 2 GPUs in 80 GB"),
    ],
)
def test_a_budget_says_whose_memory_it_is(change: dict[str, Any], words: str) -> None:
    assert capacity.budget(JobCase(**CASE | change), 80e9) == words


def test_without_a_search_there_is_nothing_to_draw(tmp_path: Path) -> None:
    none = study_of(jobs={"cases": {"held": CASE | {"capacity": False}}})
    assert not FIGURES["capacity"].condition(none)
    asked = study_of(jobs={"cases": {"held": CASE}})
    assert FIGURES["capacity"].condition(asked)
    with pytest.raises(UserError, match="no search has found"):
        drawn(asked, tmp_path, capacity_tokens=float("nan"), context_tokens=float("nan"))


def test_what_has_no_formula_has_no_mark_of_it(tmp_path: Path) -> None:
    figure = drawn(study_of(jobs={"cases": {"held": CASE}}), tmp_path, formula_tokens=float("nan"))
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "|"]
