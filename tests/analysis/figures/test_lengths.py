"""The figure of one prompt by its length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvquant.analysis.figure_list import FIGURES
from kvquant.analysis.figures import lengths
from kvquant.analysis.figures.style import PAGE_WIDTH, WIDTH
from kvquant.analysis.plot import draw_figure
from kvquant.analysis.tables import write_table
from kvquant.study.config import Study
from tests.support.studies import study_of
from tests.support.tables import job_table


def case(shape: str, prompt: int, **more: Any) -> dict[str, Any]:
    settings = {"shape": shape, "prompt": prompt, "answer": 64, "batch_size": 1}
    return settings | {"schemes": ["fp16", "nuq3"]} | more


def study(*shapes: str) -> Study:
    cases = {f"{s}-{n}": case(s, n) for s in shapes for n in (1024, 4096, 16384)}
    others: dict[str, Any] = {"batch": {"batch_size": 4}, "budget": {"memory_gb": 40.0}}
    others |= {"generated": {"decode": "generate"}}
    cases |= {name: case("7b-mha", 2048, **more) for name, more in others.items()}
    return study_of(jobs={"cases": cases})


def drawn(asked: Study, folder: Path, **changed: Any) -> Any:
    table = job_table(asked).assign(**changed)
    write_table(table, folder / "jobs.parquet")
    return lengths.draw(asked, folder)


def test_cases_of_one_prompt_are_lines(tmp_path: Path) -> None:
    figure = drawn(study("7b-mha"), tmp_path)
    assert figure.get_size_inches()[0] == WIDTH
    assert len(figure.axes) == 3
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == [
            "16-bit cache (growing, from Python)",
            "NUQ 3 bits, 1 % outliers",
        ]
        for line in axis.lines:
            assert list(line.get_xdata()) == [1024, 4096, 16384]
        assert axis.get_ylim()[0] == 0


def test_lines_that_coincide_are_both_seen(tmp_path: Path) -> None:
    for axis in drawn(study("7b-mha"), tmp_path).axes:
        below, above = axis.lines
        assert below.get_linestyle() == "-" and above.get_linestyle() == "--"
        assert above.get_markerfacecolor() == "none"
        assert above.get_markersize() > below.get_markersize()


def test_the_figure_names_its_device_and_needs_jobs(tmp_path: Path) -> None:
    asked = study("7b-mha")
    table = job_table(asked).assign(device="h200")
    for rows, said in ((table, "measured on H200"), (table.iloc[:0], "Nothing is measured yet")):
        write_table(rows, tmp_path / "jobs.parquet")
        figure = draw_figure("lengths", asked, tmp_path)
        axis = figure.axes[-1]
        words = [axis.get_xlabel(), *(text.get_text() for text in axis.texts)]
        assert any(said in one for one in words)
    assert len(figure.axes) == 1


def test_shapes_are_columns(tmp_path: Path) -> None:
    figure = drawn(study("7b-mha", "8b-gqa"), tmp_path)
    assert figure.get_size_inches()[0] == PAGE_WIDTH
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert [title for title in titles if title] == ["7B MHA, one prompt", "8B GQA, one prompt"]


def test_numbers_of_prompts_are_columns_of_their_own(tmp_path: Path) -> None:
    cases = {f"b{n}": case("7b-mha", 1024, batch_size=n) for n in (1, 16, 64)}
    cases |= {"long": case("7b-mha", 4096), "other answer": case("7b-mha", 1024, answer=8)}
    asked = study_of(jobs={"cases": {name.replace(" ", "-"): c for name, c in cases.items()}})
    table = job_table(asked)
    table["batch_size"] = [asked.job_cases()[name].batch_size for name in table.case]
    write_table(table, tmp_path / "jobs.parquet")
    figure = lengths.draw(asked, tmp_path)
    first, second = (figure.axes[at].get_title(loc="left") for at in (0, 1))
    assert (first, second) == ("7B MHA, one prompt", "7B MHA, prompts of 1K")
    decode = figure.axes[3]  # second row, second column
    (fp16, ours) = decode.lines
    assert list(fp16.get_xdata()) == [1, 16, 64]
    step = float(table[table.scheme == "nuq3"].step_ms_median.iloc[0])
    assert list(ours.get_ydata()) == pytest.approx([1e3 * n / step for n in (1, 16, 64)])
    assert decode.get_ylim()[1] > max(ours.get_ydata())


def test_names_on_an_axis_of_lengths_stay_apart() -> None:
    assert lengths._apart([1024, 4096, 16384, 65536, 131072]) == [131072, 16384, 4096, 1024]
    assert lengths._apart([16]) == [16]


def test_what_is_out_of_memory_is_left_out(tmp_path: Path) -> None:
    figure = drawn(study("7b-mha"), tmp_path, status="oom")
    assert not any(axis.lines for axis in figure.axes)
    assert all("not measured" in [t.get_text() for t in axis.texts] for axis in figure.axes)


@pytest.mark.parametrize(
    ("cases", "there"),
    [
        ({"a": case("7b-mha", 1024)}, False),
        ({"a": case("7b-mha", 1024), "b": case("8b-gqa", 4096)}, False),
        ({"a": case("7b-mha", 1024), "b": case("7b-mha", 4096)}, True),
        ({"a": case("7b-mha", 1024), "b": case("7b-mha", 4096, gpus=2)}, False),
        ({"a": case("7b-mha", 1024), "b": case("7b-mha", 1024, batch_size=8)}, True),
        ({"a": case("7b-mha", 1024), "b": case("7b-mha", 2048, batch_size=8)}, False),
    ],
)
def test_only_studies_with_several_lengths_have_it(cases: dict[str, Any], there: bool) -> None:
    asked = study_of(jobs={"cases": cases})
    assert FIGURES["lengths"].condition(asked) is there
    assert bool(lengths.series(asked)) is there


def test_of_equal_prompts_the_first_case_is_shown() -> None:
    longer = case("7b-mha", 4096, answer=512)
    lengths_of = {"a": case("7b-mha", 1024), "b": case("7b-mha", 4096), "c": longer}
    assert lengths.by_length(study_of(jobs={"cases": lengths_of})) == {"7b-mha": ["a", "b"]}
