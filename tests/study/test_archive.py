"""Published records: few files of sealed lines, in which every edit is refused by name.

Also covers: study.places.
"""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.study.archive import read_archive, renew_sums, write_archive
from kvquant.study.places import in_order, place_of
from kvquant.study.publish import publish
from tests.support.studies import study_of, write_study

EVAL = "eval/tiny/nuq3.jsonl"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The published records of a small study with every kind of record."""
    write_study(study_of(), tmp_path / "results")
    publish(tmp_path / "results", tmp_path / "archive")
    return tmp_path / "archive"


def line_with(archive: Path, part: str, name: str = EVAL) -> int:
    """The index of a packed file's first line that holds a text."""
    lines = (archive / name).read_text().split("\n")
    return next(i for i, line in enumerate(lines) if part in line)


def edit(archive: Path, at: int, old: str, new: str, name: str = EVAL) -> None:
    lines = (archive / name).read_text().split("\n")
    assert old in lines[at]
    lines[at] = lines[at].replace(old, new, 1)
    (archive / name).write_text("\n".join(lines))


def refused(archive: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_archive(archive)
    return str(caught.value)


def test_what_is_written_is_what_is_read(archive: Path, tmp_path: Path) -> None:
    found = read_archive(archive)
    results = tmp_path / "results"
    for place, record in found.items():
        assert json.loads((results / place).read_text()) == record.content
        if place.startswith("eval/"):
            assert (results / place).with_name("samples.jsonl").read_text() == record.samples
    files = sorted(str(file.relative_to(archive)) for file in archive.rglob("*") if file.is_file())
    assert files == [
        *("SHA256SUMS", "append/gpu.jsonl", "energy/gpu.jsonl", "eval/tiny/fp16.jsonl"),
        *("eval/tiny/kivi-4.jsonl", EVAL, "kernels/gpu.jsonl", "perf/gpu.jsonl"),
    ]
    write_archive(tmp_path / "again", dict(reversed(found.items())))
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (archive / name).read_bytes()
    assert read_archive(tmp_path / "none") == {}


def test_sums_are_those_of_sha256sum(archive: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=archive, check=False).returncode == 0


@pytest.mark.fault(
    "records", "a number or an answer edited in a published record", "refused, file and line named"
)
def test_an_edit_is_refused_by_name(archive: Path) -> None:
    at = line_with(archive, '"task": "passkey", "seed": 1')
    edit(archive, at, '"value": ', '"value": 1')
    told = refused(archive)
    assert told.startswith(f"{archive / EVAL}:{at + 1}: eval/tiny/nuq3/passkey/seed1/run.json: ")
    assert "was changed after it was written" in told and "\n" not in told


def test_an_edited_sample_is_refused_by_its_record(archive: Path) -> None:
    at = line_with(archive, '"task": "passkey", "seed": 0')
    edit(archive, at + 2, '"score": ', '"score":  ')
    told = refused(archive)
    assert told.startswith(f"{archive / EVAL}:{at + 1}: eval/tiny/nuq3/passkey/seed0/run.json: ")
    assert "its samples were changed" in told


@pytest.mark.fault(
    "records",
    "published records lost, given twice or moved into another file",
    "refused, file and line named",
)
@pytest.mark.parametrize("what", ["record", "sample", "file", "doubled", "moved", "cut", "other"])
def test_what_is_missing_or_elsewhere_is_named(archive: Path, what: str) -> None:
    file = archive / EVAL
    text = file.read_text()
    lines = text.split("\n")
    kernels = archive / "kernels/gpu.jsonl"
    name = file
    if what == "record":
        kernels.write_text("")
        name, word = kernels, "is not the file of SHA256SUMS, though each record is whole"
    elif what == "sample":
        file.write_text("\n".join(lines[:1] + lines[2:]))
        word = "fewer samples follow it than its"
    elif what == "file":
        file.unlink()
        word = "no such file"
    elif what == "doubled":
        name, word = kernels, "kernels/gpu/one.json is at"
        kernels.write_text(2 * kernels.read_text())
    elif what == "moved":
        name = archive / "perf/gpu.jsonl"
        name.write_text(name.read_text() + kernels.read_text())
        word = "holds a record of kernels/gpu.jsonl"
    elif what == "cut":
        file.write_text(text[:-20])
        word = "is cut"
    else:
        name = archive / "eval/tiny/fp8.jsonl"
        name.write_text(text)
        word = "is not in SHA256SUMS"
    told = refused(archive)
    assert str(name) in told and word in told


def test_random_damage_is_refused(archive: Path) -> None:
    chance = random.Random(0)
    for file in sorted(archive.rglob("*.jsonl")):
        whole = file.read_bytes()
        for _ in range(10):
            at = chance.randrange(len(whole))
            file.write_bytes(
                whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
            )
            assert str(file) in refused(archive)
        file.write_bytes(whole)
    read_archive(archive)


def test_sums_are_renewed_after_a_merge_but_not_over_an_edit(archive: Path) -> None:
    (archive / "SHA256SUMS").write_text("<<<<<<< ours\n")
    assert "SHA256SUMS:1: is no hash" in refused(archive)
    renew_sums(archive)
    assert len(read_archive(archive)) == 35
    edit(archive, 0, '"value": ', '"value": 1')
    (archive / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"nuq3\.jsonl:1: .* was changed after it was written"):
        renew_sums(archive)
    assert not (archive / "SHA256SUMS").exists()


def test_numbers_in_places_are_sorted_by_value() -> None:
    places = [f"eval/m/s/t/seed{n}/run.json" for n in (10, 2, 0)]
    assert sorted(places, key=in_order) == places[::-1]


@pytest.mark.fault("security", "a published record whose names lead out of its folder", "refused")
@pytest.mark.parametrize("scheme", ["../../x", "a/b", "", None, "A"])
def test_names_that_are_no_names_are_refused(scheme: object) -> None:
    fields = {"model": "m", "scheme": scheme, "task": "t", "seed": 0}
    with pytest.raises(ValueError, match="field 'scheme'"):
        place_of("eval", fields)
    with pytest.raises(ValueError, match="field 'seed'"):
        place_of("eval", fields | {"scheme": "s", "seed": -1})
    with pytest.raises(ValueError, match="field 'kind'"):
        place_of("other", fields)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "eval/../../x.jsonl", "a.txt"])
def test_sums_name_files_of_this_folder_only(archive: Path, name: str) -> None:
    with (archive / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    assert "names no file of records in this folder" in refused(archive)


def test_an_empty_file_is_named_once_and_for_all(archive: Path) -> None:
    (archive / "eval/tiny/extra.jsonl").write_text("")
    with pytest.raises(UserError, match=r"extra\.jsonl: is empty: remove it"):
        renew_sums(archive)


@pytest.mark.fault(
    "records", "published samples of power that were edited, removed or added", "refused by name"
)
@pytest.mark.parametrize("what", ["edited", "removed", "added"])
def test_samples_of_power_are_those_of_the_sums(archive: Path, what: str) -> None:
    records = read_archive(archive)
    write_archive(archive, records, {"jobs/cpu-tiny.csv": "seconds,joules\n0.1,3\n"})
    assert read_archive(archive).keys() == records.keys()
    file = archive / "jobs/cpu-tiny.csv"
    if what == "edited":
        file.write_text("seconds,joules\n0.1,2\n")
    elif what == "removed":
        file.unlink()
    else:
        file = file.rename(file.with_name("other.csv"))
    told = refused(archive)
    assert (
        str(file) in told
        and {"edited": "was changed", "removed": "no such file"}.get(what, "is not in SHA256SUMS")
        in told
    )
