"""Collected tables: any changed byte is refused, whatever parquet makes of it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvquant.analysis.tables import read_table, write_table
from kvquant.errors import UserError


def example() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "scheme": ["fp16", "nuq3", None, "kvquant-seal"],
            "value": [1.5, np.nan, -0.0, 1 / 3],
            "row": pd.array([1, None, 3, 2**53 + 1], dtype="Int64"),
            "flag": [True, False, True, True],
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(example(), tmp_path / "eval.parquet")
    return tmp_path


def test_round_trip(folder: Path) -> None:
    pd.testing.assert_frame_equal(read_table(folder, "eval"), example())
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "eval.parquet"), example())
    assert pd.read_csv(folder / "eval.csv")["value"][3] == pytest.approx(1 / 3)
    before = (folder / "eval.parquet").read_bytes()
    write_table(example(), folder / "eval.parquet")
    assert (folder / "eval.parquet").read_bytes() == before


@pytest.mark.fault(
    "records",
    "any byte of a collected table, parquet or CSV",
    "refused by name",
)
@pytest.mark.parametrize("twin", [True, False])
def test_every_changed_byte_is_refused(folder: Path, twin: bool) -> None:
    file, rng = folder / "eval.parquet", random.Random(0)
    if not twin:
        (folder / "eval.csv").unlink()
    raw = file.read_bytes()
    seal = raw.index(b"kvquant-seal:")
    for at in [*range(seal - 8, seal + 16), *rng.sample(range(len(raw)), 150)]:
        changed = bytearray(raw)
        changed[at] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"eval\.parquet") as error:
            read_table(folder, "eval")
        assert "\n" not in str(error.value)


def test_a_cut_table_is_refused(folder: Path) -> None:
    file = folder / "eval.parquet"
    raw = file.read_bytes()
    for size in (0, 3, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:size])
        with pytest.raises(UserError, match=r"eval\.parquet"):
            read_table(folder, "eval")


def test_the_twin_is_the_same_table(folder: Path) -> None:
    twin = folder / "eval.csv"
    twin.write_text(twin.read_text().replace("1.5", "2.5"))
    with pytest.raises(UserError, match=r"eval\.csv: is not the table of eval\.parquet"):
        read_table(folder, "eval")


@pytest.mark.fault(
    "records",
    "a table edited with another program",
    "refused by name",
)
def test_an_edit_with_another_program_is_refused(folder: Path) -> None:
    read_table(folder, "eval").assign(value=7.0).to_parquet(folder / "eval.parquet")
    with pytest.raises(UserError, match="has no seal"):
        read_table(folder, "eval")


def test_a_table_from_elsewhere_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example().to_parquet(tmp_path / "eval.parquet")
    assert len(read_table(tmp_path, "eval")) == 4
    assert "has no seal and no CSV twin" in capsys.readouterr().err


@pytest.mark.fault(
    "records",
    "tests or Pareto table computed from other tables",
    "refused as stale",
)
def test_what_is_computed_from_other_tables_is_stale(folder: Path) -> None:
    write_table(example(), folder / "tests.parquet", [folder / "eval.parquet"])
    read_table(folder, "tests")
    write_table(example().iloc[:2], folder / "eval.parquet")
    with pytest.raises(UserError, match=r"tests\.parquet: was computed from another eval\.parquet"):
        read_table(folder, "tests")


@pytest.mark.parametrize("what", ["missing", "folder", "link"])
def test_what_is_no_table_is_named(folder: Path, what: str) -> None:
    file = folder / "eval.parquet"
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "link":
        file.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"--tables: .*eval\.parquet") as error:
        read_table(folder, "eval")
    assert "\n" not in str(error.value)
