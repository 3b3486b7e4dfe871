"""What is read back to be run or believed comes from files that this user alone can write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.kernels.cubin_cache import cached
from kvquant.runtime import private_folder as module
from kvquant.runtime.devices import claim_alone, claim_shared, one_at_a_time
from kvquant.runtime.private_folder import private_folder, read_private


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(content: bytes) -> bytes:
    """What comes for a key whose file was made with `content` if it is believed."""
    return cached([b"key"], lambda: content)


def test_folder_and_files_are_private(place: Path) -> None:
    old = os.umask(0)
    try:
        kept(b"first")
    finally:
        os.umask(old)
    (file,) = place.iterdir()
    assert place.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600
    assert kept(b"second") == b"first"


@pytest.mark.fault(
    "security",
    "a cache folder that others can write",
    "not used",
)
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_that_others_can_write_is_not_believed(place: Path, mode: int) -> None:
    kept(b"first")
    place.chmod(mode)
    assert kept(b"second") == b"second"
    place.chmod(0o700)
    assert kept(b"third") == b"first"  # nor was anything written


def test_folder_that_others_could_only_read_is_made_private(place: Path) -> None:
    kept(b"first")
    place.chmod(0o755)
    assert kept(b"second") == b"first"
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.fault(
    "security",
    "compiled code or hashes in a file that others can write",
    "not used",
)
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_file_that_others_can_write_is_not_believed(place: Path, mode: int) -> None:
    kept(b"first")
    (file,) = place.iterdir()
    file.chmod(mode)
    assert kept(b"second") == b"second"
    assert kept(b"third") == b"second" and file.stat().st_mode & 0o777 == 0o600


@pytest.mark.fault(
    "security",
    "links in the private cache",
    "not followed",
)
def test_links_are_not_followed(place: Path, tmp_path: Path) -> None:
    kept(b"first")
    (file,) = place.iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert kept(b"second") == b"second" and not file.is_symlink()
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    assert kept(b"third") == b"third"


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_private(tmp_path / "pipe") is None
    assert read_private(tmp_path) is None and read_private(tmp_path / "none") is None


@pytest.mark.fault(
    "security",
    "a cache folder of another user",
    "not used",
)
def test_folder_of_another_user_is_not_used(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(b"first")
    monkeypatch.setattr(module.os, "getuid", lambda: 4711)
    assert private_folder(place) is None and read_private(next(place.iterdir())) is None
    assert kept(b"second") == b"second"
    # Locks in the folder for temporary files, whose name everybody knows.
    locks = tmp_path / "locks"
    locks.mkdir()
    with pytest.raises(OSError, match="not a folder of this user alone"), one_at_a_time(locks):
        pass
    assert claim_shared(["gpu"], folder=locks) == [0]
    assert claim_alone(["gpu"], folder=locks) == [0]
    assert not list(locks.iterdir())


def test_quanto_takes_no_turns_in_a_strange_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from kvquant.schemes import quanto_extension

    extensions = SimpleNamespace(
        is_extension_available=lambda name: True,
        get_extension=lambda name: SimpleNamespace(build_directory=str(tmp_path)),
    )
    monkeypatch.setattr(quanto_extension.importlib, "import_module", lambda name: extensions)
    (tmp_path / "turns").symlink_to(tmp_path)
    monkeypatch.setattr(quanto_extension, "_turns", lambda folder: tmp_path / "turns")
    with pytest.raises(UserError, match="is not a folder of this user alone"):
        quanto_extension.build.__wrapped__()
