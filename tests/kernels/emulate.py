"""Runs `cuda/pack.cu` on a CPU: compiled by g++ with coroutines for threads (`emulated.h`)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvquant import batched_quant
from kvquant.kernels import cuda_pack

HERE = Path(__file__).parent
SOURCES = Path(cuda_pack.__file__).parent / "cuda"


@functools.cache
def _library(constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pack.so"
        macros = [f"-D{name}={value}" for name, value in constants]
        subprocess.run(
            [
                "g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-DEMULATED",
                *macros, f"-I{HERE}", f"-I{SOURCES}", HERE / "emulated_pack.cpp", "-o", out,
            ],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(out))


def _function(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    launch = getattr(library, f"launch_{name}")

    def call(grid: tuple[int, int, int], threads: int, *arguments: Any) -> None:
        launch(
            grid[0], threads, (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        )

    return call


def _functions(shape: cuda_pack.PackShape, device: int) -> tuple[Any, Any, Any]:
    library = _library(tuple(shape.constants().items()))
    group = _function(library, "group_values") if shape.per_side else None
    return _function(library, "pack_keys"), _function(library, "pack_values"), group


def emulate(monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 1) -> None:
    """Lets the quantizer take the emulated kernels, for tensors on a CPU."""
    monkeypatch.setattr(cuda_pack, "functions", _functions)
    monkeypatch.setattr(cuda_pack, "index_of", lambda x: 0)
    monkeypatch.setattr(cuda_pack, "multiprocessors", lambda index: multiprocessors)
    monkeypatch.setattr(
        batched_quant, "use_cuda_pack", lambda shape, device: shape.refusal() is None
    )
