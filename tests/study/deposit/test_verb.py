"""The verb archive: the same records give the same bytes, and edited ones none.

Also covers: study.deposit.options, study.deposit.contents, study.deposit.metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.study.archive import read_archive
from kvquant.study.config import Study, load_study


def call(study: Study, repository: Path, out: Path, *more: str) -> int:
    file = out.with_name("asked.json")
    file.write_text(study.model_dump_json().replace('"data_dir":"/some/where"', '"data_dir":null'))
    words = ["archive", "--study", str(file), "--repository", str(repository), "--out", str(out)]
    return main([*words, *more])


def test_the_same_bytes_each_time(study: Study, repository: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    assert call(study, repository, first) == 0
    for file in repository.rglob("*"):
        os.utime(file, (0, 0))
    assert call(study, repository, second) == 0
    assert first.read_bytes() == second.read_bytes()


def test_what_it_holds_and_how_it_is_checked(
    study: Study, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(study, repository, tmp_path / "a.zip") == 0
    digest = hashlib.sha256((tmp_path / "a.zip").read_bytes()).hexdigest()
    assert digest in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.testzip() is None
        packed.extractall(tmp_path / "out")
    folder = tmp_path / "out/kvquant-check"
    names = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {line.partition("  ")[2]: line.partition("  ")[0] for line in lines}
    assert sums.keys() == names - {"SHA256SUMS"}
    for name, expected in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert {"LICENSE", "CITATION.cff", "requirements.lock", "envs/library.yaml", "README.md",
            ".zenodo.json", "ro-crate-metadata.json", "study.json"} < names  # fmt: skip
    assert len(read_archive(folder / "published")) == 35
    # the study is whole and belongs to no machine
    kept = load_study(folder / "study.json")
    assert kept.published == "published" and kept.data_dir is None and kept.tasks == study.tasks
    assert str(tmp_path) not in (folder / "study.json").read_text()
    told = json.loads((folder / ".zenodo.json").read_text())
    assert told["creators"] == [{"name": "Curie, Maria"}, {"name": "A group"}]
    assert told["upload_type"] == "dataset" and told["license"] == "Apache-2.0"
    assert "sha256sum -c SHA256SUMS" in (folder / "README.md").read_text()


@pytest.mark.fault(
    "records", "an edited number in published records that are archived", "refused, nothing written"
)
def test_edited_records_are_not_archived(
    study: Study, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "published/eval/tiny/fp16.jsonl"
    file.write_text(file.read_text().replace('"seconds": 1.5', '"seconds": 1.4', 1))
    assert call(study, repository, tmp_path / "a.zip") == 2
    assert f"{file}:1" in capsys.readouterr().err and not (tmp_path / "a.zip").exists()


def test_records_of_another_configuration_are_not_archived(
    study: Study, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = study.tasks | {"ppl": study.tasks["ppl"].model_copy(update={"window": 32})}
    assert call(study.model_copy(update={"tasks": tasks}), repository, tmp_path / "a.zip") == 2
    assert "measured with another configuration" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["LICENSE", "CITATION.cff", "requirements.lock", "envs"])
def test_a_missing_file_is_named(
    study: Study, repository: Path, tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / lost).rename(repository / "elsewhere")
    assert call(study, repository, tmp_path / "a.zip") == 2
    told = capsys.readouterr().err
    assert lost in told and told.count("\n") == 1 and not (tmp_path / "a.zip").exists()


def test_options_are_checked(
    study: Study, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = study.model_copy(update={"published": None})
    assert call(alone, repository, tmp_path / "a.zip") == 2
    assert "--archive: the study names no published records" in capsys.readouterr().err
    assert call(study, repository, tmp_path / "a.tar") == 2
    assert "must end with .zip" in capsys.readouterr().err
    bill = tmp_path / "sbom.json"
    bill.write_text("{}")
    assert call(study, repository, tmp_path / "a.zip", "--sbom", str(bill)) == 2
    assert "is no CycloneDX document" in capsys.readouterr().err
    bill.write_text('{"bomFormat": "CycloneDX"}')
    assert call(study, repository, tmp_path / "a.zip", "--sbom", str(bill)) == 0
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert "kvquant-check/sbom.json" in packed.namelist()
