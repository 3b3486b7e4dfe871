"""Quantizers beside published records: taken where they fit, refused where they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.study import published_quantizers
from kvquant.study.archive import read_archive
from kvquant.study.published_quantizers import published_quantizer, quantizer_problems
from tests.support.quantizers import save_random_quantizer
from tests.support.studies import study_of, write_evaluation

DIGEST = "0123456789abcdef"


def write_quantizer(results: Path, scheme: str = "nuq3", zero: float = 0.3) -> str:
    """Writes a quantizer of a results folder; returns the hash of its tensors."""
    return save_random_quantizer(results / "models/tiny" / scheme, "tiny", scheme, DIGEST, zero)


def publish(results: Path, archive: Path) -> int:
    return main(["publish", "--results", str(results), "--archive", str(archive)])


@pytest.fixture
def archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Published records of one scheme with its quantizer."""
    used = write_quantizer(tmp_path / "r")
    write_evaluation(study_of(), tmp_path / "r", "tiny", "nuq3", "passkey", 0, used)
    assert publish(tmp_path / "r", tmp_path / "a") == 0
    assert "quantizer of tiny/nuq3" in capsys.readouterr().out
    return tmp_path / "a"


def test_the_published_quantizer_is_found_by_its_digest(archive: Path, tmp_path: Path) -> None:
    found = published_quantizer(archive, "tiny", "nuq3", DIGEST)
    assert found is not None
    assert found.read_bytes() == (tmp_path / "r/models/tiny/nuq3/quantizer.json").read_bytes()
    assert published_quantizer(archive, "tiny", "nuq3", "f" * 16) is None
    assert published_quantizer(archive, "tiny", "kivi-4", DIGEST) is None
    assert published_quantizer(None, "tiny", "nuq3", DIGEST) is None
    assert publish(tmp_path / "r", archive) == 0  # once more changes nothing


@pytest.mark.fault("records", "a published quantizer whose files were changed", "refused by name")
@pytest.mark.parametrize("name", ["quantizer.json", "quantizer.safetensors"])
def test_a_changed_quantizer_is_refused(archive: Path, name: str) -> None:
    file = archive / "quantizers/tiny/nuq3" / name
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"quantizers/tiny/nuq3/quantizer\.json: "):
        published_quantizer(archive, "tiny", "nuq3", DIGEST)
    assert main(["publish", "--archive", str(archive)]) == 2


@pytest.mark.fault(
    "records", "a record that another calibration's quantizer measured", "refused, not published"
)
def test_records_of_another_quantizer_are_refused(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_quantizer(tmp_path / "s", zero=0.4)
    write_evaluation(study_of(), tmp_path / "s", "tiny", "nuq3", "passkey", 1, other)
    before = (archive / "SHA256SUMS").read_text()
    assert publish(tmp_path / "s", archive) == 2
    assert "is not the published quantizer of 'nuq3'" in capsys.readouterr().err
    assert (archive / "SHA256SUMS").read_text() == before
    assert not quantizer_problems(archive, read_archive(archive).values())


def test_many_records_of_another_quantizer_take_one_line(archive: Path, tmp_path: Path) -> None:
    other = write_quantizer(tmp_path / "s", zero=0.4)
    record = next(iter(read_archive(archive).values()))
    wrong = dict(record.content) | {"inputs": {"quantizer": other}}
    records = [replace(record, content=wrong, where=f"line {i}") for i in range(30)]
    (found,) = quantizer_problems(archive, records)
    assert found.startswith("line 0: field 'inputs.quantizer': is not the published quantizer of")
    assert "), and 29 more records: measure again with that one" in found


@pytest.mark.fault(
    "records", "tensors of a published quantizer without its manifest", "refused by name"
)
def test_tensors_without_a_manifest_are_refused(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (archive / "quantizers/tiny/nuq3/quantizer.json").unlink()
    capsys.readouterr()
    assert main(["publish", "--archive", str(archive)]) == 2
    found = capsys.readouterr().err
    assert "tiny/nuq3/quantizer.safetensors: has no quantizer.json beside it" in found
    assert publish(tmp_path / "r", archive) == 0  # which also mends what was interrupted


def test_records_of_two_quantizers_are_not_published_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even with no quantizer beside them: no later publication could mend it."""
    used = [write_quantizer(tmp_path / "r", zero=zero) for zero in (0.3, 0.4)]
    for seed, digest in enumerate(used):
        write_evaluation(study_of(), tmp_path / "r", "tiny", "nuq3", "passkey", seed, digest)
    for remove in (False, True):
        if remove:
            (tmp_path / "r/models/tiny/nuq3/quantizer.json").unlink()
        assert publish(tmp_path / "r", tmp_path / "a") == 2
        found = capsys.readouterr().err
        assert "passkey/seed1/run.json: field 'inputs.quantizer': is not the quantizer of" in found
        assert "seed0/run.json" in found
        assert not (tmp_path / "a").exists()


@pytest.mark.fault(
    "records", "a quantizer that is damaged before it is published", "refused with its records"
)
@pytest.mark.parametrize("damage", ["edited", "no object", "no tensors"])
def test_nothing_is_published_with_a_damaged_quantizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    used = write_quantizer(tmp_path / "r")
    write_evaluation(study_of(), tmp_path / "r", "tiny", "nuq3", "passkey", 0, used)
    file = tmp_path / "r/models/tiny/nuq3/quantizer.json"
    if damage == "edited":
        file.write_text(file.read_text().replace('"head_dim": 16', '"head_dim": 32'))
    elif damage == "no object":
        file.write_text("[1]")
    else:
        file.with_name("quantizer.safetensors").unlink()
    assert publish(tmp_path / "r", tmp_path / "a") == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and f"{file}: " in found
    assert "build it again (`kvquant quantize`)" in found
    assert not (tmp_path / "a").exists()


def test_a_link_to_nothing_is_replaced_and_not_followed(archive: Path, tmp_path: Path) -> None:
    file = archive / "quantizers/tiny/nuq3/quantizer.json"
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere.json")
    assert publish(tmp_path / "r", archive) == 0
    assert not file.is_symlink() and not (tmp_path / "elsewhere.json").exists()
    assert published_quantizer(archive, "tiny", "nuq3", DIGEST) == file


def test_a_large_quantizer_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_quantizers, "MAX_BYTES", 100)
    used = write_quantizer(tmp_path / "r")
    write_evaluation(study_of(), tmp_path / "r", "tiny", "nuq3", "passkey", 0, used)
    assert publish(tmp_path / "r", tmp_path / "a") == 0
    assert not (tmp_path / "a/quantizers").exists()


def test_a_quantizer_of_another_scheme_is_refused(archive: Path) -> None:
    folder = archive / "quantizers/tiny/nuq3"
    folder.rename(folder.with_name("kivi-4"))
    problems = quantizer_problems(archive, read_archive(archive).values())
    assert len(problems) == 1 and "of another model or scheme" in problems[0]
    assert json.loads((folder.with_name("kivi-4") / "quantizer.json").read_text())["seal"]
