"""The landing page: what it says, where its numbers come from, and what it links to.

Also covers: analysis.landing.claim_rows, analysis.landing.measured_on,
analysis.landing.options, analysis.landing.results, analysis.landing.terms.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis import figure_list, page_list
from kvquant.analysis.claim_list import CLAIMS
from kvquant.analysis.claims import ANY
from kvquant.analysis.evidence import NOT_MEASURED, SUPPORTED
from kvquant.analysis.evidence import VERDICTS as ALL_VERDICTS
from kvquant.analysis.landing.claim_rows import COLUMNS, claim_rows, verdict_counts
from kvquant.analysis.landing.measured_on import devices, digest
from kvquant.analysis.landing.page import MARKS, TABLES, context_of, page
from kvquant.analysis.landing.results import Results, results_of
from kvquant.analysis.landing.terms import TESTS, VERDICTS, terms
from kvquant.analysis.suite_tables import MARKS as PAPER_MARKS
from kvquant.errors import UserError
from tests.analysis.landing.conftest import COMMAND, Written
from tests.support.measured import HOSTILE
from tests.support.studies import LONG_CALLS, study_of


@pytest.fixture
def here(written: Written, monkeypatch: pytest.MonkeyPatch) -> Written:
    """The study's folder is the current one, as in a run of the workflow."""
    monkeypatch.chdir(written.work)
    return written


@pytest.fixture(scope="module")
def text(written: Written) -> str:
    return (written.work / written.args.out).read_text(encoding="utf-8")


def results(written: Written) -> Results:
    args = written.args
    study = written.measured.study
    return results_of(study, args.results, args.figures, args.pages, args.explorer)


def test_claims_name_figures_and_tables_that_there_are() -> None:
    for claim in CLAIMS.values():
        assert claim.figures or claim.pages, claim.name
        assert set(claim.figures) <= figure_list.FIGURES.keys()
        assert set(claim.pages) <= page_list.PAGES.keys()


def test_every_verdict_has_its_meaning() -> None:
    assert tuple(VERDICTS) == ALL_VERDICTS and MARKS.keys() == set(ALL_VERDICTS)
    assert {word for word, (mark, _) in TESTS.items() if mark} == PAPER_MARKS.keys()


def test_terms_are_those_of_the_study() -> None:
    plain = {term.name: term for term in terms(study_of(kernels=None))}
    assert "Random weights" not in plain
    assert {word for word, _ in plain["Protocols"].items} == {"Protocol A", "Protocol B"}
    assert "8-bit attention" not in plain
    passkey = {"suite": "passkey", "length": 200, "samples": 4}
    schemes = {"fp16": {"kind": "fp16"}, "nuq3": {"kind": "fp8", "prompt_attention": "8-bit"}}
    eight = study_of(schemes=schemes, tasks=LONG_CALLS)
    assert "128 new tokens" in {term.name: term for term in terms(eight)}["8-bit attention"].text
    one = study_of(tasks={"passkey": passkey}, statistics={"alpha": 0.01})
    found = {term.name: term for term in terms(one)}
    assert "Random weights" in found and "99 % interval" in found["Intervals"].text
    assert [word for word, _ in found["Protocols"].items] == ["Protocol A"]


def test_the_page_says_what_the_study_is(written: Written, text: str) -> None:
    study, shown = written.measured.study, unescape(text)
    assert text.count("<h1>") == 1 and "<img src=x" not in text and "</script>" not in text
    assert f"<h1>{study.title}</h1>" in shown and HOSTILE in shown
    quantized = sum(spec.quantizes for spec in study.schemes.values())
    sentence = f"compares {quantized} such caches with the unquantized one on tiny and Other model"
    assert sentence in text and f"{len(study.tasks)} tasks with {len(study.seeds)} seeds" in text
    assert "memory, time and energy" in text and "Measured so far" in text
    assert COMMAND in shown


def test_claims_are_those_of_the_table(written: Written, text: str) -> None:
    table = pd.read_csv(written.work / written.args.tables / "claims.csv", keep_default_na=False)
    shown = unescape(text)
    for row in table.to_dict("records"):
        assert row["claim"] in shown and row["verdict"] in shown
        assert all(part in shown for part in row["measured"].split("; "))
        assert row.get("evidence", "") in shown and row["definition"] in shown
    for verdict, count in table["verdict"].value_counts().items():
        assert f"<strong>{count}</strong> {verdict}" in text


def claim(**changed: str) -> pd.DataFrame:
    row = dict.fromkeys(COLUMNS, "x") | {"verdict": SUPPORTED, "model": ANY} | changed
    return pd.DataFrame([row])


def test_more_columns_of_claims_change_nothing(here: Written) -> None:
    known = next(iter(CLAIMS.values())).text
    plain = list(claim_rows(claim(claim=known), results(here)))
    assert list(claim_rows(claim(claim=known, record="a1", another="5"), results(here))) == plain
    assert verdict_counts(plain) == [(SUPPORTED, 1)]
    with pytest.raises(UserError, match="no column 'verdict'"):
        list(claim_rows(claim().drop(columns="verdict"), results(here)))


def test_a_value_is_shown_with_its_interval_and_bar(here: Written) -> None:
    numbers = {"value": "0.48231", "low": "0.477", "high": "0.49", "interval": "range of trials"}
    words = {"quantity": "joules per token", "cache": "ours", "baseline": "theirs", "n": "1300"}
    words |= {"workload": "16K", "device": "H200", "bar": "at most 0.55", "n_of": "prompts"}
    (row,) = claim_rows(claim(**numbers, **words), results(here))
    assert row.value == (
        "0.482 [0.477, 0.490]", "joules per token, brackets: range of trials",
        "ours against theirs, 16K, on H200", "bar: at most 0.55",
    )  # fmt: skip
    assert row.evidence == "1,300 prompts"
    text = page(context_of(here.measured.study, here.args) | {"claims": [row]})
    assert "<strong>0.482 [0.477, 0.490]</strong>" in text and "All that was measured" in text
    without = numbers | words | {"low": "", "high": "", "bar": "", "n": "", "device": ""}
    (row,) = claim_rows(claim(**without), results(here))
    assert row.value == ("0.482", "joules per token", "ours against theirs, 16K")
    assert row.evidence == ""
    (row,) = claim_rows(claim(value="", evidence="5 seeds"), results(here))
    assert row.value == () and row.evidence == "5 seeds"


def test_a_claim_links_to_what_is_behind_it(here: Written) -> None:
    shown = results(here)
    (known,) = claim_rows(claim(claim=CLAIMS["loss-grows"].text), shown)
    assert known.results[0] == shown.figures["perplexity"]
    (unknown,) = claim_rows(claim(claim="Another", verdict=NOT_MEASURED), shown)
    assert unknown.results == (shown.pages["claims"],) and not unknown.is_measured
    two = pd.concat([claim(model="tiny", measured="1; 2"), claim(model="other")])
    one = next(claim_rows(two, shown))
    assert one.model == "tiny" and one.measured == ("1", "2")
    assert next(claim_rows(claim(model="tiny"), shown)).model == ""


def test_what_a_companion_measured_names_its_study_and_has_no_links(here: Written) -> None:
    known = claim(claim=CLAIMS["loss-grows"].text, study="other", value="1", cache="ours")
    (row,) = claim_rows(known, results(here))
    assert row.results == () and row.value[-1] == "ours, study other"


def test_links_tell_results_apart_and_lead_to_files(written: Written, text: str) -> None:
    shown = results(written)
    labels = [result.label for result in shown.all()]
    assert len(set(labels)) == len(labels)
    assert shown.pages["energy"].label == "Table: every job (energy)"
    report = written.work / written.args.results
    links = {unescape(link).partition("#")[0] for link in re.findall(r'href="([^"#][^"]*)"', text)}
    assert links >= {result.href for result in shown.all()}
    assert links >= {f"tables/{file.name}" for file in (report / "tables").glob("*.csv")}
    for link in links:
        assert (report / link).is_file(), link


def test_only_figures_and_tables_of_the_study_are_linked(here: Written) -> None:
    args, study = here.args, here.measured.study
    with pytest.raises(UserError, match="unknown"):
        results_of(study, args.results, [Path("unknown.svg")], [], args.explorer)
    with pytest.raises(UserError, match="unknown"):
        results_of(study, args.results, [], [Path("unknown.html")], args.explorer)


def test_every_collected_table_has_its_meaning(written: Written) -> None:
    tables = {file.stem for file in (written.work / written.args.tables).glob("*.csv")}
    assert tables == TABLES.keys()


def test_numbers_follow_the_records(here: Written, tmp_path: Path) -> None:
    """The hash is that of all records' seals; one record less is another hash and a count less."""
    folder = here.args.results
    files = sorted(f for f in folder.rglob("*.json") if f.name != "study.json")
    seals = sorted(json.loads(file.read_text())["seal"] for file in files)
    expected = hashlib.sha256("".join(f"{seal}\n" for seal in seals).encode()).hexdigest()
    found = context_of(here.measured.study, here.args)
    assert found["digest"] == expected and found["records"] == len(files)
    assert sum(device.records.total() for device in found["devices"]) == len(files)
    assert expected in (here.work / here.args.out).read_text(encoding="utf-8")
    fewer = tmp_path / "results"
    shutil.copytree(folder, fewer)
    next(fewer.glob("eval/*/*/*/seed0/run.json")).unlink()
    less = context_of(here.measured.study, type(here.args)(**{**vars(here.args), "results": fewer}))
    assert less["records"] == len(files) - 1 and less["digest"] != expected


def record(seal: str, kind: str = "eval", **environment: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"python": "3.12.3", "gpus": [], "packages": {"torch": "2.11.0"}}
    given |= {"commit": "a" * 40, "dirty": None, "system": "Linux x86_64"} | environment
    return {"kind": kind, "seal": seal, "environment": given}


def test_devices_are_told_with_their_versions() -> None:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1"}
    there = [record("a", gpus=[gpu, gpu]), record("b", "jobs", gpus=[gpu], dirty=True)]
    there.append(record("c", packages={"torch": "2.12.0"}))
    first, second = devices(there)
    assert first.name == "H100 80GB HBM3" and first.drivers == {"580.1"} and first.changed == 1
    assert dict(first.records) == {"evaluations": 1, "cases of whole jobs": 1}
    assert first.versions == {"Python": {"3.12.3"}, "PyTorch": {"2.11.0"}}
    assert second.name == "processor without GPU (Linux x86_64)" and not second.drivers
    assert dict(second.commits) == {"a" * 12: 1}
    assert digest(there) == digest(there[::-1]) != digest(there[:2])
    assert digest([]) == ""


def test_a_study_without_records_or_claims_says_so(here: Written) -> None:
    context = context_of(here.measured.study, here.args)
    rows = list(claim_rows(claim(verdict=NOT_MEASURED), results(here)))
    nothing = {"claims": [], "unmeasured": rows, "devices": [], "figures": [], "published": None}
    text = page(context | nothing)
    assert "There is no record yet" in text and "1 claim that this study does not measure" in text
    assert "all others are measured" in text and "Main figures" not in text
    published = page(context | {"published": "results/published/x", "unfinished": False})
    assert "kvquant publish --archive results/published/x" in published
    assert "All of it is measured" in published


def test_claims_that_cannot_be_read_are_named(here: Written, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    shutil.copytree(here.args.tables, tables)
    (tables / "claims.csv").unlink()
    with pytest.raises(UserError, match=r"claims\.csv: cannot be read .*kvquant claims"):
        context_of(here.measured.study, type(here.args)(**{**vars(here.args), "tables": tables}))
