"""Pages of the report: which there are, their rows and names, and what they escape.

Also covers: analysis.page_list.
"""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import pytest
from docutils.core import publish_parts  # type: ignore[import-untyped]

from kvquant.analysis import html_tables, page_list
from kvquant.analysis.collect import JOB_COLUMNS
from kvquant.analysis.evidence import SUPPORTED
from kvquant.analysis.html_tables import as_restructured, page, table_of
from kvquant.analysis.labels import labels_of
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from tests.support.studies import study_of
from tests.support.tables import accuracy_tables, job_table

NAN, INF = float("nan"), float("inf")
CASE: dict[str, Any] = {"shape": "7b-mha", "prompt": 4096, "answer": 64}
CASE |= {"schemes": ["fp16", "nuq3"]}
STUDY = study_of(
    jobs={
        "cases": {
            "held": CASE | {"memory_gb": 40, "capacity": True},
            "metered": CASE | {"batch_size": 2, "energy": True},
        }
    }
)


def test_a_page_escapes_its_cells() -> None:
    table = pd.DataFrame([{"a_b": "<script>", "n": NAN, "verdict": SUPPORTED, "x": 1.25}])
    text = page(table, "<t>", "A & B")
    assert "<script>" not in text and "&lt;script&gt;" in text and "A &amp; B" in text
    assert "nan" not in text and "<td class='yes'>supported</td>" in text and ">1.25<" in text
    assert "Nothing of this kind" in page(table.iloc[:0], "t", "c")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "0"), (26000.0, "26,000"), (1234567, "1,234,567"), (0.1234567, "0.1235")),
        *((2e-21, "2e-21"), (-INF, "-inf"), (NAN, "-"), (-0.00126, "-0.00126")),
    ],
)
def test_numbers_are_rounded_for_reading(value: float, shown: str) -> None:
    assert f">{shown}</td>" in page(pd.DataFrame({"a": [value]}), "t", "c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The table of whole jobs: one case searched what fits, the other measured energy."""
    jobs = job_table(STUDY)
    jobs.loc[jobs.case == "metered", "capacity_tokens"] = NAN
    jobs.loc[jobs.case == "held", ["joules_per_token", "source"]] = [NAN, None]
    write_table(jobs, tmp_path / "jobs.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "cases", "heads"),
    [
        ("jobs", 2, {"whole job, tokens/s", "peak memory, GB", "decoded by", "trials"}),
        ("capacity", 1, {"tokens held", "by formula", "memory, GB", "weights, GB"}),
        ("job-energy", 1, {"J per token", "lowest trial", "counter over power", "source"}),
    ],
)
def test_whole_jobs_have_pages(folder: Path, name: str, cases: int, heads: set[str]) -> None:
    table = table_of(STUDY, folder, name)
    assert len(table) == 2 * cases and table["case"].nunique() == cases
    assert heads <= set(table.columns)
    assert table["case"].str.startswith("7B MHA").all()
    assert set(table["cache"]) == {"16-bit cache", "NUQ 3 bits, 1 % outliers"}


def test_bytes_are_shown_in_gigabytes(folder: Path) -> None:
    held = table_of(STUDY, folder, "capacity")
    assert held["memory, GB"].to_list() == [40.0, 40.0]
    assert ">200,000<" in page(held, "t", "c")


@pytest.mark.parametrize("name", ["jobs", "capacity", "job-energy"])
def test_pages_of_an_unfinished_study_say_so(tmp_path: Path, name: str) -> None:
    write_table(pd.DataFrame(columns=JOB_COLUMNS), tmp_path / "jobs.parquet")
    assert "Nothing of this kind" in page(table_of(STUDY, tmp_path, name), "t", "c")


def test_a_study_without_whole_jobs_has_no_such_page(tmp_path: Path) -> None:
    study = study_of()
    missing = {*page_list.PAGES} - {*page_list.shown(study)}
    assert missing == {"jobs", "capacity", "job-energy", "ablation"}
    assert {*page_list.PAGES} - {*page_list.shown(STUDY)} == {"ablation"}
    file = tmp_path / "study.json"
    file.write_text(study.model_dump_json(), encoding="utf-8")
    for name, words in (("jobs", "no section 'jobs'"), ("job", "job")):
        args = argparse.Namespace(study=str(file), tables=tmp_path, out=[tmp_path / f"{name}.html"])
        with pytest.raises(UserError, match=words):
            html_tables.run(args)


def test_the_page_of_all_axes_names_the_task(tmp_path: Path) -> None:
    evaluations, none = accuracy_tables(STUDY)[0], pd.DataFrame()
    write_table(pareto_table(STUDY, evaluations, none, none), tmp_path / "pareto.parquet")
    table = table_of(STUDY, tmp_path, "summary")
    (name,) = table["task of bits and perplexity"].unique()
    assert name == labels_of(STUDY).task("ppl")
    assert "<td>no</td>" in page(table, "t", "c")
    timed = {"timed workload", "metered workload"}
    assert not timed & set(table.columns)  # nothing was timed


MARKUP = ["a_b *c* `d`_ |e| \\ ``f``", "{{ g }} {% h %} {# i #} {j}"]


@pytest.mark.parametrize("text", [*MARKUP, *(shown.caption for shown in page_list.PAGES.values())])
def test_captions_are_plain_text(text: str) -> None:
    """Jinja and docutils, which Snakemake renders captions with, give back the text itself."""
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        as_restructured(text)
    )
    body = publish_parts(template.render(), writer="html")["body"]
    assert html.unescape(re.sub(r"<[^>]+>", "", body)).split() == text.split()


def test_captions_are_written_beside_pages(folder: Path) -> None:
    (folder / "study.json").write_text(STUDY.model_dump_json(), encoding="utf-8")
    files = [folder / f"report/jobs{suffix}" for suffix in (".html", ".rst")]
    given = {"study": str(folder / "study.json"), "tables": folder, "out": files}
    html_tables.run(argparse.Namespace(**given))
    caption = page_list.PAGES["jobs"].caption
    assert html.escape(caption) in files[0].read_text(encoding="utf-8")
    assert files[1].read_text(encoding="utf-8") == as_restructured(caption)
