"""Schemes and models by the words of a command line.

Also covers: fetch.asked_model.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.study.asked_schemes import (
    asked_scheme,
    asked_schemes,
    one_of_each_kind,
)
from kvquant.study.scheme_kinds import SCHEME_KINDS


def test_kinds_and_options() -> None:
    assert asked_scheme("allocated") == asked_scheme("allocated-3")
    assert asked_scheme("kivi") == asked_scheme("kivi-4")
    assert asked_scheme("kind=kivi,bits=2,group=64").meaning()["group"] == 64
    assert asked_scheme("kind=nuq,bits=3,q_norm=true").meaning()["q_norm"] is True
    assert list(asked_schemes(["fp8", "kivi"])) == ["fp8", "kivi"]


def test_every_kind_has_a_scheme() -> None:
    assert [scheme.kind for scheme in one_of_each_kind().values()] == list(SCHEME_KINDS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kivi4", "did you mean kivi-4"),
        ("kind=kivy,bits=2", "unknown scheme kind 'kivy': did you mean kivi"),
        ("bits=2", "unknown scheme kind 'None'"),
        ("kind=kivi,bits=5", "--scheme: kind=kivi,bits=5: bits: "),
        ("kind=kivi,bits=2,bits=4", "each option once"),
        ("kind=kivi,=2", "each option once"),
        ("kind=kivi,bits=[", "'[' is no value"),
        ("kind=kivi,bits=2,outliers=0.1", "outliers: Extra inputs"),
    ],
)
def test_wrong_words_take_one_line(text: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        asked_scheme(text)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with" / "it").mkdir(parents=True)
    (tmp_path / "with" / "it" / "config.json").touch()
    assert asked_model("with/it") == "with/it"
    assert asked_model("./with/it") == "with/it"
    assert asked_model("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert asked_model("~/with/it") == str(tmp_path / "with/it")
    for wrong in ("with", "./with", "/nowhere", "a/b/c"):
        with pytest.raises(UserError, match="is no folder with a config"):
            asked_model(wrong)
