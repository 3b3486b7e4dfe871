"""A text is the one of its manifest, and calibration never sees the test part.

Also covers: fetch.datasets.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.fetch.datasets import (
    fetch_data,
    join_rows,
    refuse_other_texts,
    rows_of_file,
)
from kvquant.fetch.texts import load_text, read_data_manifest
from kvquant.study.datasets import DATASETS
from tests.support.mutations import damaged_copy
from tests.support.studies import study_of

TEXT = "Zwölf Boxkämpfer\n\njagen Viktor quer."


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    facts = {
        "schema_version": 1,
        "dataset": "boxers",
        "source": "pypi",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "characters": len(TEXT),
        "test_from": 18,
        "file": "text.txt",
    }
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    return tmp_path / "manifest.json"


def test_parts_make_up_the_text(manifest: Path) -> None:
    assert load_text(manifest) == TEXT
    assert load_text(manifest, "calibration") + load_text(manifest, "test") == TEXT
    assert read_data_manifest(manifest).dataset == "boxers"


@pytest.mark.fault(
    "custody",
    "a changed text",
    "refused",
)
def test_changed_text_is_refused(manifest: Path) -> None:
    (manifest.parent / "text.txt").write_text("something else")
    with pytest.raises(UserError, match="sha256 differs"):
        load_text(manifest)
    (manifest.parent / "text.txt").unlink()
    with pytest.raises(UserError, match="missing"):
        load_text(manifest)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"dataset": "x"', '"text"'])
def test_damaged_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "manifest.json"
    with pytest.raises(UserError, match="no such file"):
        load_text(file)
    file.write_text(content)
    with pytest.raises(UserError, match="fetch it again") as error:
        load_text(file)
    assert len(str(error.value).splitlines()) == 1


def test_test_only_text_cannot_calibrate(manifest: Path) -> None:
    facts = {**json.loads(manifest.read_text()), "test_from": 0}
    manifest.write_text(json.dumps(facts))
    assert load_text(manifest, "test") == TEXT
    with pytest.raises(UserError, match=r"calibration\.dataset"):
        load_text(manifest, "calibration")


@pytest.mark.fault(
    "custody",
    "an edited manifest of a text",
    "refused",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_from": 17}, "test_from: 17, but 'essays' has 459742"),
        ({"characters": 643829}, "characters"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"test_from": -1}, "not within the text"),
        ({"test_from": 10**9}, "not within the text"),
        ({"test_from": "0"}, "not a number"),
        ({"test_from": True}, "not a number"),
        ({"characters": 643830.0}, "not a number"),
        ({"file": "../text.txt"}, "inside the manifest's folder"),
        ({"file": "/etc/passwd"}, "inside the manifest's folder"),
        ({"file": ".."}, "inside the manifest's folder"),
        ({"file": "a\0b"}, "inside the manifest's folder"),
        ({"dataset": "squad", "test_from": 5}, "test text only"),
        ({"dataset": ""}, "not a text"),
    ],
)
def test_edited_manifest_is_refused(
    manifest: Path, change: dict[str, object], message: str
) -> None:
    pinned = DATASETS["essays"].pinned
    assert pinned is not None
    digest, characters, test_from = pinned.sha256, pinned.characters, pinned.test_from
    facts = {**json.loads(manifest.read_text()), "dataset": "essays", "sha256": digest}
    facts |= {"characters": characters, "test_from": test_from}
    manifest.write_text(json.dumps(facts))
    read_data_manifest(manifest, "essays")
    manifest.write_text(json.dumps({**facts, **change}))
    with pytest.raises(UserError, match=message) as error:
        read_data_manifest(manifest)
    assert len(str(error.value).splitlines()) == 1 and str(manifest) in str(error.value)


def test_values_are_recomputed_from_the_text(manifest: Path) -> None:
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "characters": len(TEXT.encode())}))
    with pytest.raises(UserError, match=f"characters: {len(TEXT.encode())}, the text has"):
        load_text(manifest)
    with pytest.raises(UserError, match="is of 'boxers', not of 'essays'"):
        load_text(manifest, "all", "essays")


def test_files_that_are_none_or_damaged(manifest: Path) -> None:
    text = manifest.parent / "text.txt"
    facts = {**json.loads(manifest.read_text()), "sha256": hashlib.sha256(b"\xff").hexdigest()}
    manifest.write_text(json.dumps(facts))
    text.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"text\.txt: damaged: byte 0 is not UTF-8"):
        load_text(manifest)
    text.unlink()
    text.mkdir()
    with pytest.raises(UserError, match=r"text\.txt: a folder"):
        load_text(manifest)
    text.rmdir()
    text.symlink_to("nothing")
    with pytest.raises(UserError, match=r"text\.txt: a link to nothing"):
        load_text(manifest)
    manifest.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_data_manifest(manifest)
    with pytest.raises(UserError, match="a file stands where a folder"):
        read_data_manifest(manifest / "manifest.json")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_a_manifest_is_one_line(manifest: Path, data: st.DataObject) -> None:
    file = damaged_copy(manifest, data)
    try:
        load_text(file)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@given(st.lists(st.sampled_from(["", " = Head = ", " a b c . "]), min_size=1, max_size=8))
def test_rows_of_a_raw_file(lines: list[str]) -> None:
    raw = "".join((line or " ") + "\n" for line in lines)
    rows = rows_of_file(raw)
    assert rows == [line + "\n" if line else "" for line in lines]
    assert join_rows(rows).count("\n\n") >= len(lines) - 1


def test_wikitext_from_data_dir(tmp_path: Path, data_dir: Path) -> None:
    found = fetch_data("wikitext2", tmp_path / "manifest.json", str(data_dir))
    assert (pinned := DATASETS["wikitext2"].pinned) and found["sha256"] == pinned.sha256
    text = load_text(tmp_path / "manifest.json", "test")
    assert text.startswith("\n\n = Robert Boulter = \n")
    assert len(text) == found["characters"] == 1_294_336


def test_bad_data_dir_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out" / "manifest.json"
    with pytest.raises(UserError, match="data_dir: no such directory"):
        fetch_data("wikitext2", out, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no wikitext-2/wiki\.test\.raw"):
        fetch_data("wikitext2", out, str(tmp_path))
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "wiki.test.raw").write_text("another text\n")
    with pytest.raises(UserError, match="sha256"):
        fetch_data("wikitext2", out, str(tmp_path))
    with pytest.raises(UserError, match="did you mean wikitext2"):
        fetch_data("wikitext", out)
    assert not out.exists()
    assert not (out.parent / "text.txt").exists()


@pytest.mark.fault(
    "custody",
    "a `data_dir` whose file is not the text that was fetched from it before",
    "refused before anything is measured, with the file and the folder to remove",
)
def test_another_text_in_data_dir_is_refused(tmp_path: Path) -> None:
    """A run reads what was fetched, and would not see the other text."""
    data, cache = tmp_path / "data_dir", tmp_path / "cache"
    (data / "longbench").mkdir(parents=True)
    row = {"context": "a", "input": "b", "answers": ["c"], "all_classes": None}
    file = data / "longbench/hotpotqa.jsonl"
    file.write_text(json.dumps(row) + "\n")
    tasks = {"qa": {"suite": "longbench", "task": "hotpotqa"}}
    study = study_of(data_dir=str(data), tasks=tasks)
    refuse_other_texts(study, cache)  # nothing is fetched yet
    fetch_data(
        "longbench-hotpotqa", cache / "data/longbench-hotpotqa/manifest.json", study.data_dir
    )
    refuse_other_texts(study, cache)
    file.write_text(json.dumps(row | {"answers": ["d"]}) + "\n")
    with pytest.raises(UserError, match=r"^data_dir: .*hotpotqa.jsonl is not .* remove .*cache"):
        refuse_other_texts(study, cache)
