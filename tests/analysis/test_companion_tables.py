"""Claims about 8-bit attention, judged on the published records of a study's companions."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from kvquant.analysis import companion
from kvquant.analysis.claim_list import CLAIMS
from kvquant.analysis.claims import judge, named, num_models, readable
from kvquant.analysis.companion_tables import attention_companions, collect_published
from kvquant.analysis.evidence import NOT_MEASURED, SUPPORTED
from kvquant.analysis.numbers import of_study
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study
from tests.support.studies import study_of

LOSS, SPEED = CLAIMS["attention-loss"].text, CLAIMS["attention-speed"].text


@pytest.fixture
def study(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study that has no 8-bit attention, whose companions have: one is published, one is not."""
    monkeypatch.chdir(root)
    raw = load_study(root / "config/attention_gemma.yaml").model_dump(mode="json")
    unpublished = tmp_path / "unpublished.json"
    unpublished.write_text(json.dumps(raw | {"published": str(tmp_path / "none")}))
    others = {"a": "config/attention.yaml", "b": str(unpublished), "c": "config/two_gpus.yaml"}
    return study_of(companions=others, published=str(tmp_path / "nothing"))


def tables_of(study: Study, folder: Path) -> Tables:
    companion.write_tables(study, folder)
    return load_tables(study, folder)


def claims_of(study: Study, folder: Path) -> pd.DataFrame:
    return readable(named(study, judge(tables_of(study, folder))))


def test_a_claim_has_a_row_for_the_model_of_each_companion(study: Study, tmp_path: Path) -> None:
    table = claims_of(study, tmp_path)
    rows = table[table.claim == LOSS]
    assert list(rows.model) == ["SmolLM2-135M-Instruct", "Gemma-3-270M"]
    assert list(rows.study) == ["attention", "attention-gemma"]
    assert list(rows.verdict) == [SUPPORTED, NOT_MEASURED]
    where = rows.iloc[0]["where"]
    assert "protocol B" in where
    assert where.endswith(", study attention")
    # a study without whole jobs says nothing about their time
    assert list(table[table.claim == SPEED].study) == ["attention"]
    assert set(table[~table.claim.str.contains("8-bit attention")].study) == {""}


def test_a_companion_without_8_bit_attention_is_not_asked(study: Study) -> None:
    assert [t.study.study for t in attention_companions(study)] == ["attention", "attention-gemma"]


def test_models_are_told_apart_where_companions_add_some(study: Study, tmp_path: Path) -> None:
    alone = study.model_copy(update={"companions": {}})
    more = num_models(claims_of(study, tmp_path)) - num_models(claims_of(alone, tmp_path))
    assert more == 2


def test_counts_of_claims_rest_on_the_records_of_companions(study: Study, tmp_path: Path) -> None:
    found = {n.key: n for n in of_study.numbers(tables_of(study, tmp_path))}
    assert found["claims"].records and found["claims.supported"].value != "0"
    assert not found["evaluations"].records


def test_a_study_that_names_no_records_is_refused(study: Study) -> None:
    with pytest.raises(UserError, match="'check' names no published records"):
        collect_published(study.model_copy(update={"published": None}))
