"""Runs the CUDA kernels on a CPU, compiled by g++ with coroutines for threads (`emulated.h`)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
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


@functools.cache
def _library(name: str, header: str) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{name}.so"
        Path(folder, HEADER_NAME).write_text(header)
        subprocess.run(
            [
                "g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-DEMULATED",
                "-fvisibility=hidden", f"-I{folder}", f"-I{HERE}", f"-I{SOURCES}",
                HERE / f"emulated_{name}.cpp", "-o", out,
            ],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(out))


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


def _decode_functions(shape: cuda_decode.DecodeShape, device: int) -> tuple[Any, Any]:
    name = "decode_allocated" if shape.allocated else "decode"
    library = _library(name, shape.header(SHARED_BYTES))
    return _function(library, "decode"), _function(library, "combine")


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
    _instead(monkeypatch, cuda_expand_allocated, function=_expand_function)


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
