"""Compiled kernels on disk: made once, never believed when damaged, never needed.

Also covers: kernels.cuda_build.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvquant.kernels import cuda_build
from kvquant.kernels.cubin_cache import cached, folder
from kvquant.kernels.cuda_build import KernelUnavailable, compile_cubin
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.cuda_header import cuda_header


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Makes something else each time, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return f"cubin {self.calls}".encode()


def test_is_made_once_for_a_key(place: Path) -> None:
    make = Maker()
    assert [cached([b"a", b"bc"], make) for _ in range(3)] == [b"cubin 1"] * 3
    assert cached([b"ab", b"c"], make) == b"cubin 2"
    assert len(list(place.iterdir())) == make.calls == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "folder"])
def test_a_damaged_file_is_made_again(place: Path, damage: str) -> None:
    make = Maker()
    cached([b"a"], make)
    (file,) = place.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        contents: dict[str, bytes | bytearray] = {
            "cut": content[:-1],
            "changed": content,
            "empty": b"",
        }
        file.write_bytes(contents[damage])
    assert cached([b"a"], make) == b"cubin 2"
    if damage != "folder":
        assert cached([b"a"], make) == b"cubin 2"
    assert not list(place.glob(".new-*"))


def test_no_folder_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    make = Maker()
    for wrong in (tmp_path / "file", tmp_path / "file/below", Path("/proc/none")):
        monkeypatch.setenv("KVQUANT_CACHE", str(wrong))
        before = make.calls
        assert cached([b"a"], make) == f"cubin {before + 1}".encode()
    monkeypatch.delenv("KVQUANT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cached([b"a"], make) == b"cubin 4"


def test_a_full_disk_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cached([b"a"], Maker()) == b"cubin 1"
    assert not list(place.iterdir())


def test_many_at_once_read_whole_files(place: Path) -> None:
    content = os.urandom(1 << 16)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cached([b"a"], lambda: content), range(40)))
    assert found == [content] * 40
    assert len(list(place.iterdir())) == 1


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVQUANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder() == Path("/x/kvquant")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path.home() / ".cache/kvquant"
    monkeypatch.setenv("KVQUANT_CACHE", "/y")
    assert folder() == Path("/y")


def test_nvrtc_compiles_once_for_options_and_source(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    header = DecodeShape(2, 64, 3, 64, torch.float16, True).header(233_472)
    first = compile_cubin("decode.cu", header, "sm_90")

    def never(*args: object) -> bytes:
        raise AssertionError("compiled again")

    compiled = cuda_build._compile
    monkeypatch.setattr(cuda_build, "_compile", never)
    assert compile_cubin("decode.cu", header, "sm_90") == first
    with pytest.raises(AssertionError, match="again"):
        compile_cubin("decode.cu", header, "sm_80")
    monkeypatch.setattr(cuda_build, "_compile", compiled)
    for _ in range(2):  # an error is not kept
        with pytest.raises(KernelUnavailable, match=r"decode\.cu"):
            compile_cubin("decode.cu", cuda_header({"BITS": 3}, ()), "sm_90")
    assert len(list(place.iterdir())) == 1
