"""Records: created once, whole, verified when read."""

from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.files import write_new
from kvquant.records import EvalRecord, Percentiles, read_record, write_record


def test_written_once_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.json"
    write_new(path, "one")
    write_new(path, "one")
    with pytest.raises(UserError, match="not overwritten"):
        write_new(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "empty JSON"), ('{"study": "x", ', "truncated"), ("{}", "field 'study'")],
)
def test_damaged_records_are_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=word) as error:
        read_record(path, EvalRecord)
    assert "run.json" in str(error.value)
    assert "delete it by name" in str(error.value)


def test_round_trip(tmp_path: Path) -> None:
    record = Percentiles(median=1.0, p10=0.5, p90=2.0, p99=3.0, n=5)
    write_record(tmp_path / "p.json", record)
    assert read_record(tmp_path / "p.json", Percentiles) == record
