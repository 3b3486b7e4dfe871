"""Runs the CUDA kernels on a CPU, compiled by g++ with coroutines for threads (`emulated.h`)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvquant.kernels import (
    backends,
    cuda_decode,
    cuda_expand_allocated,
    cuda_pack,
    cuda_pack_allocated,
)
from kvquant.kernels.cuda_header import HEADER_NAME

HERE = Path(__file__).parent
SHARED_BYTES = 228 * 1024  # of a multiprocessor of an H100
SOURCES = Path(cuda_pack.__file__).parent / "cuda"


# Compiled libraries by the hash of all that they are made of; unused ones are removed.
CACHE = HERE.parent.parent / ".pytest_cache/emulated"
KEPT_DAYS = 14
FLAGS = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-DEMULATED"),
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",  # it takes a change of stacks for an overflow
)


@functools.cache
def _made_of() -> str:
    """Returns the hash of the compiler, the flags and every source."""
    told: list[str | bytes] = [platform.machine(), *FLAGS]
    told += [subprocess.run(["g++", "-v"], check=True, capture_output=True).stderr]
    files = [f for folder in (HERE, SOURCES) for f in sorted(folder.iterdir()) if f.is_file()]
    for file in files:
        if file.suffix in (".cpp", ".cu", ".cuh", ".h"):
            told += [file.name, file.read_bytes()]
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another worker was first
            if old.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                old.unlink()
    hashed = hashlib.sha256()
    for part in told:
        found = part if isinstance(part, bytes) else part.encode()
        hashed.update(f"{len(found)}:".encode() + found)
    return hashed.hexdigest()


@functools.cache
def _library(name: str, header: str) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    key = hashlib.sha256(f"{_made_of()} {name} {header}".encode()).hexdigest()
    kept = CACHE / f"{key}.so"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            out = Path(folder) / kept.name
            Path(folder, HEADER_NAME).write_text(header)
            includes = (f"-I{folder}", f"-I{HERE}", f"-I{SOURCES}")
            source = HERE / f"emulated_{name}.cpp"
            subprocess.run(["g++", *FLAGS, *includes, source, "-o", out], check=True)
            out.replace(kept)
    kept.touch()
    return ctypes.CDLL(str(kept))


def _function(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    launch = getattr(library, f"launch_{name}")

    def call(grid: tuple[int, int, int], threads: int, *arguments: Any) -> None:
        launch(
            *grid, threads, (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        )

    return call


def _pack_functions(shape: cuda_pack.PackShape, device: int) -> tuple[Any, Any, Any]:
    library = _library("pack", shape.header())
    group = _function(library, "group_values") if shape.per_side else None
    return _function(library, "pack_keys"), _function(library, "pack_values"), group


def _pack_allocated_functions(
    shape: cuda_pack_allocated.AllocatedPackShape, device: int
) -> tuple[Any, Any]:
    library = _library("pack_allocated", shape.header())
    keys, values = (_function(library, f"pack_allocated_{side}") for side in ("keys", "values"))
    return keys, values


def _decode_functions(shape: cuda_decode.DecodeShape, device: int) -> tuple[Any, Any, Any]:
    name = "decode_allocated" if shape.allocated else "decode"
    library = _library(name, shape.header(SHARED_BYTES))
    decode, combine = _function(library, "decode"), _function(library, "combine")
    return decode, combine, _function(library, "combine_with_sinks")


def _expand_function(shape: cuda_decode.DecodeShape, device: int) -> Any:
    text = cuda_expand_allocated.header(shape, SHARED_BYTES)
    return _function(_library("expand_allocated", text), "expand")


def _instead(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **given: Any) -> None:
    for name, value in given.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "index_of", lambda x: 0)


def emulate_decode(monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 1) -> None:
    """Lets :func:`kvquant.kernels.cuda_decode.decode_attention` take tensors on a CPU."""
    _instead(
        monkeypatch,
        cuda_decode,
        functions=_decode_functions,
        multiprocessors=lambda index: multiprocessors,
        shared_memory=lambda index: SHARED_BYTES,
    )


def emulate_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets :func:`kvquant.kernels.cuda_expand_allocated.expand` take tensors on a CPU."""
    _instead(
        monkeypatch,
        cuda_expand_allocated,
        function=_expand_function,
        multiprocessors=lambda index: 1,
        shared_memory=lambda index: SHARED_BYTES,
    )


def emulate(monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 1) -> None:
    """Lets the quantizer take the emulated kernels, for tensors on a CPU."""
    _instead(
        monkeypatch,
        cuda_pack,
        functions=_pack_functions,
        multiprocessors=lambda index: multiprocessors,
    )
    _instead(
        monkeypatch,
        cuda_pack_allocated,
        functions=_pack_allocated_functions,
        multiprocessors=lambda index: 1,  # room for one thread block: none waits for another
    )
    facts = backends.DeviceFacts("cuda", capability=(9, 0), triton=False)
    monkeypatch.setattr(backends, "device_facts", lambda device: facts)
