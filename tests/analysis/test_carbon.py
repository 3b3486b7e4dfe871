"""Grams of CO2e beside joules in the tables and pages of energy jobs and of whole jobs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis import carbon, html_tables, latex
from kvquant.analysis.html_tables import caption_of, table_of
from kvquant.analysis.latex import build_table
from kvquant.analysis.study_tables import Tables
from kvquant.analysis.tables import write_table
from kvquant.energy.carbon_intensity import electricity, source
from kvquant.errors import UserError
from kvquant.study import digests
from kvquant.study.config import Study, load_study
from tests.support.studies import study_of
from tests.support.tables import accuracy_tables, job_table, timed_tables

pytest.importorskip("codecarbon")
CASE: dict[str, Any] = {"shape": "7b-mha", "prompt": 4096, "answer": 64, "energy": True}
CASE |= {"schemes": ["fp16", "nuq3"]}


def study(**changed: Any) -> Study:
    return study_of(**{"jobs": {"cases": {"one": CASE}}, "countries": ["FRA", "POL"]} | changed)


def tables_of(asked: Study, **changed: pd.DataFrame) -> Tables:
    none = pd.DataFrame()
    energy = timed_tables(asked)[1].assign(source="nvml")
    jobs = job_table(asked) if asked.jobs is not None else none
    found = Tables(asked, accuracy_tables(asked)[0], none, energy, none, none, none, jobs)
    return replace(found, **changed)


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in line.removesuffix(r"\\").split(" & ")] for line in lines]


def grams(joules_per_token: float, country: str) -> float:
    """A million tokens' joules in kWh, times the country's intensity."""
    return joules_per_token * 1e6 / 3.6e6 * electricity(country).grams_per_kwh


def test_the_table_of_energy_has_a_column_per_country() -> None:
    t = tables_of(study())
    head, *rows = cells(build_table("energy", t))
    columns = [i for i, name in enumerate(head) if "CO2e" in name]
    assert [head[i] for i in columns] == ["g CO2e/M, FRA", "g CO2e/M, POL"]
    assert columns[-1] < head.index("trials") and len({len(row) for row in [head, *rows]}) == 1
    for row, given in zip(rows, t.energy.itertuples(), strict=True):
        for i, country in zip(columns, ("FRA", "POL"), strict=True):
            sides = (given.scheme_joules_per_token, given.base_joules_per_token)
            assert row[i] == " / ".join(f"{grams(j, country):,.2f}" for j in sides)


def test_the_table_of_whole_jobs_has_them_too() -> None:
    t = tables_of(study(countries=["USA"]))
    head, *rows = cells(build_table("job-energy", t))
    column = head.index("g CO2e/M, USA")
    found = [row[column] for row in rows]
    assert found == [f"{grams(j, 'USA'):,.2f}" for j in t.jobs.joules_per_token]


def test_captions_name_the_source_where_there_are_grams() -> None:
    t = tables_of(study())
    lines = latex.floats(t).splitlines()
    for name in ("energy", "job-energy"):
        (line,) = (one for one in lines if one.endswith(f"{{{name}}}"))
        assert line.count(source()) == 1 and "GPU boards" in line
        for country in ("FRA", "POL"):
            place = electricity(country)
            assert f"{place.grams_per_kwh:,.0f} g/kWh in {place.name} ({country}, " in line
    (line,) = (one for one in lines if one.endswith("{throughput}"))
    assert "CO2e" not in line


@pytest.mark.parametrize("case", ["estimated", "no country"])
def test_estimates_and_no_countries_have_no_grams(case: str, tmp_path: Path) -> None:
    asked = study(countries=[]) if case == "no country" else study()
    t = tables_of(asked)
    if case == "estimated":
        t = replace(t, **{n: getattr(t, n).assign(source=case) for n in ("energy", "jobs")})
    for name in ("energy", "job-energy"):
        assert "CO2e" not in build_table(name, t)
    assert "CO2e" not in latex.floats(t)
    for name in ("energy", "jobs"):
        write_table(getattr(t, name), tmp_path / f"{name}.parquet")
    for name in ("energy", "job-energy"):
        table = table_of(asked, tmp_path, name)
        assert not [head for head in table.columns if "CO2e" in head]
        assert "CO2e" not in caption_of(asked, name, table)


def test_a_row_that_was_estimated_has_a_dash() -> None:
    t = tables_of(study())
    mixed = t.energy.copy()
    mixed.loc[mixed.index[0], "source"] = "estimated"
    head, first, *rest = cells(build_table("energy", replace(t, energy=mixed)))
    columns = [i for i, name in enumerate(head) if "CO2e" in name]
    assert columns and all(first[i] == "-" for i in columns)
    assert all(row[i] != "-" for row in rest for i in columns)


def test_pages_show_grams_beside_joules(tmp_path: Path) -> None:
    asked = study(countries=["FRA"])
    t = tables_of(asked)
    for name in ("energy", "jobs"):
        write_table(getattr(t, name), tmp_path / f"{name}.parquet")
    table = table_of(asked, tmp_path, "energy")
    heads = list(table.columns)
    for head, column in (("", "scheme"), ("unquantized, ", "base")):
        at = heads.index(f"{head}{carbon.UNIT}, FRA")
        assert heads[at - 1] == f"{head}J per token"
        expected = [grams(j, "FRA") for j in t.energy[f"{column}_joules_per_token"]]
        assert table.iloc[:, at].to_list() == pytest.approx(expected)
    assert caption_of(asked, "energy", table).endswith(carbon.explained(asked))
    table = table_of(asked, tmp_path, "job-energy")
    assert table[f"{carbon.UNIT}, FRA"].to_list() == pytest.approx(
        [grams(j, "FRA") for j in t.jobs.joules_per_token]
    )
    file = tmp_path / "study.json"
    file.write_text(asked.model_dump_json(), encoding="utf-8")
    out = tmp_path / "job-energy.html"
    html_tables.run(argparse.Namespace(study=str(file), tables=tmp_path, out=[out]))
    assert source() in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"countries": ["POL", "XYZ"]}, "countries.1"),
        ({"countries": ["pol"]}, "countries.0"),
        ({"energy": {"country": "ZZZ"}}, "energy.country"),
        ({"jobs": {"cases": {"one": CASE}, "country": "Q"}}, "jobs.country"),
    ],
)
def test_an_unknown_country_is_refused_in_one_line(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as refused:
        study(**changed)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"config: {field}: CodeCarbon knows no country")


def test_a_country_is_given_once() -> None:
    with pytest.raises(UserError, match="countries: an entry is given twice"):
        study(countries=["POL", "POL"])


def test_countries_are_presentation_alone(root: Path) -> None:
    """They change no digest, and a study that does not name them is written without them."""
    one, other = study(), study(countries=["SWE"])
    assert digests.jobs_digest(one, "one") == digests.jobs_digest(other, "one")
    (scheme, workload, _), *_ = one.energy_cells()
    assert digests.energy_digest(one, "tiny", scheme, workload) == digests.energy_digest(
        other, "tiny", scheme, workload
    )
    plain = load_study(root / "config/config.yaml")
    assert "countries" not in plain.model_dump(mode="json") and len(plain.countries) > 1
    for country in plain.countries:  # those of the default are not checked when a study is read
        assert electricity(country).grams_per_kwh > 0
