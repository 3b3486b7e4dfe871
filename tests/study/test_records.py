"""Records: created once, whole, sealed, verified when read.

Also covers: formats.sealing, study.record_types.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvquant.errors import UserError
from kvquant.formats.files import write_new
from kvquant.formats.sealing import seal_of
from kvquant.study.records import EvalRecord, Percentiles, read_record, write_record
from tests.support.studies import eval_record


def test_written_once_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.json"
    write_new(path, "one")
    write_new(path, "one")
    with pytest.raises(UserError, match="not overwritten"):
        write_new(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.fault(
    "records",
    "a record that is empty, cut, not UTF-8, with a key twice, NaN or 1e999",
    "one line with its name",
)
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty JSON"),
        ('{"study": "x", ', "truncated"),
        ("{}", "field 'study'"),
        ("[1]", "field 'record'"),
        ("\udcff", "byte 0 is not UTF-8"),
        ('{"study": "a", "study": "b"}', "key 'study' is given twice"),
        ('{"value": NaN}', "NaN is not a number"),
        ('{"value": 1e999}', "1e999 is beyond every number"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=word) as error:
        read_record(path, EvalRecord)
    assert "run.json" in str(error.value)
    assert "delete it by name" in str(error.value)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing result"):
        read_record(tmp_path / "none.json", EvalRecord)
    (tmp_path / "link.json").symlink_to("nowhere")
    (tmp_path / "folder.json").mkdir()
    for name, word in (("link", "a link to nothing"), ("folder", "a folder, not a file")):
        with pytest.raises(UserError, match=word):
            read_record(tmp_path / f"{name}.json", EvalRecord)


def test_round_trip(tmp_path: Path) -> None:
    record = Percentiles(median=1.0, p10=0.5, p90=2.0, p99=3.0, n=5)
    write_record(tmp_path / "p.json", record)
    assert read_record(tmp_path / "p.json", Percentiles) == record
    sealed = eval_record()
    write_record(tmp_path / "e.json", sealed)
    found = read_record(tmp_path / "e.json", EvalRecord)
    assert found.model_copy(update={"seal": ""}) == sealed and len(found.seal) == 64
    write_record(tmp_path / "e.json", found)  # the same bytes again


def test_records_name_8_bit_attention_alone(tmp_path: Path) -> None:
    """Those of 16-bit attention read as before there was another, and have the same seal."""
    for bits, there in (("16-bit", False), ("8-bit", True)):
        file = tmp_path / f"{bits}.json"
        write_record(file, eval_record(prompt_attention=bits))
        assert ("prompt_attention" in json.loads(file.read_text())) is there
        assert read_record(file, EvalRecord).prompt_attention == bits
    with pytest.raises(ValidationError, match="prompt_attention"):
        eval_record(prompt_attention="4-bit")


@pytest.mark.fault(
    "records",
    "any field of a record edited",
    "refused: changed after it was written",
)
@pytest.mark.parametrize(
    ("name", "value"),
    [("value", 60.0), ("seed", 1), ("cache_bytes", 1001), ("scheme", "kivi-4"), ("seal", "0" * 64)],
)
def test_a_changed_field_is_refused(tmp_path: Path, name: str, value: object) -> None:
    file = tmp_path / "run.json"
    write_record(file, eval_record())
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw))  # only the form differs
    read_record(file, EvalRecord)
    raw[name] = value
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"run\.json: was changed after it was written"):
        read_record(file, EvalRecord)


@pytest.mark.fault(
    "records",
    "a numeric string, a bool or a float for an integer, an unknown field",
    "refused by field",
)
@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("value", "50.0", "field 'value'"),
        ("seed", 0.0, "field 'seed'"),
        ("seed", True, "field 'seed'"),
        ("samples", "2", "field 'samples'"),
        ("metrics", {"accuracy": "50"}, "field 'metrics.accuracy'"),
        ("another", 1, "field 'another'"),
        ("environment", {"a": "\ud800"}, "lone surrogate"),
    ],
)
def test_wrong_types_are_refused_also_with_a_right_seal(
    tmp_path: Path, name: str, value: object, word: str
) -> None:
    file = tmp_path / "run.json"
    write_record(file, eval_record())
    raw = json.loads(file.read_text()) | {name: value}
    try:
        raw["seal"] = seal_of(raw)
    except ValueError:
        assert "surrogate" in word
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=word):
        read_record(file, EvalRecord)


def test_nan_is_not_written() -> None:
    with pytest.raises(ValidationError, match="finite"):
        eval_record(value=float("nan"))


def test_a_record_of_before_seals_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    raw = json.loads(eval_record().model_dump_json(exclude={"seal", "inputs"}))
    file.write_text(json.dumps(raw | {"schema_version": 1}))
    with pytest.raises(UserError, match=r"'schema_version': is 1.*kvquant seal --results") as error:
        read_record(file, EvalRecord)
    assert "\n" not in str(error.value)
