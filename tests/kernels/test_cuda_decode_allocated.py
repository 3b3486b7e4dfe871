"""The CUDA decode kernel of allocated codes against float64 attention over unpacked blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.kernels.cuda_build import compile_cubin
from kvquant.kernels.cuda_decode import DecodeShape
from tests.kernels.emulate import emulate_decode
from tests.support.decode_case import TOLERANCE, allocated_case, decode_error

CAPPED: dict[str, Any] = {"soft_cap": 1.5, "learned": True}
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}


def error_of(
    dim: int,
    group: int,
    size: int,
    outliers: float,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    device: str,
    **options: Any,
) -> float:
    more = {name: options.pop(name) for name in ("spread", *CAPPED) if name in options}
    made = allocated_case(dim, group, size, outliers, dtype, device=device, **options)
    return decode_error(
        3, dim, group, size, outliers, dtype, lengths, device=device, made=made, **more
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("value_range", ["token", "token-head"])
@pytest.mark.parametrize("outliers", [0.0, 0.0025, 0.02])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (128, 1), (128, 4), (256, 8)])
@pytest.mark.parametrize(("size", "more"), [(64, {}), (128, {}), (512, {}), (64, CAPPED)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_close_to_float64(
    dim: int,
    group: int,
    size: int,
    outliers: float,
    value_range: Any,
    dtype: torch.dtype,
    more: dict[str, Any],
) -> None:
    lengths = [(0, 1), (1, size - 1), (7, 0), (40 if size < 512 else 5, size)]
    given = dim, group, size, outliers, dtype, lengths, "cuda"
    error = error_of(*given, value_range=value_range, **more)
    assert error < TOLERANCE[dtype]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("dim", "group", "size", "outliers", "dtype", "value_range", "more"),
    [
        (128, 4, 64, 0.0025, torch.float16, "token", {}),
        (128, 1, 512, 0.02, torch.float16, "token-head", {}),
        (64, 3, 64, 0.01, torch.float16, "token", {}),
        (256, 8, 128, 0.0025, torch.bfloat16, "token", {}),
        (64, 8, 64, 0.0, torch.float16, "token-head", {}),
        (64, 8, 64, 0.0025, torch.bfloat16, "token", CAPPED),
    ],
)
def test_source_on_a_cpu(
    dim: int,
    group: int,
    size: int,
    outliers: float,
    dtype: torch.dtype,
    value_range: Any,
    more: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's source, compiled for a CPU: no sequence, one block, several splits."""
    emulate_decode(monkeypatch, multiprocessors=16)
    lengths = [(0, 1), (1, size - 1), (7, 0), (12 if size < 512 else 2, size)]
    given = dim, group, size, outliers, dtype, lengths, "cpu"
    error = error_of(*given, value_range=value_range, **more)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize(("width", "even"), [*((w, False) for w in range(1, 7)), (4, True)])
def test_every_width(width: int, even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        emulate_decode(monkeypatch, multiprocessors=16)
    lengths = [(3, 7), (1, 0)]
    error = error_of(64, 1, 64, 0.0025, torch.float16, lengths, device, width=width, even=even)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_range_times_the_scale_of_a_head_exceeds_fp16(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The range is that of the other head, whose scale is 1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        emulate_decode(monkeypatch, multiprocessors=16)
    options: dict[str, Any] = {"width": 6, "scales": (64.0, 1.0), "spread": 1500.0}
    error = error_of(64, 1, 64, 0.0, dtype, [(3, 7), (1, 0)], device, **options)
    assert error < 0.03  # differences of large numbers, in codes that are coarse for this head


@pytest.mark.parametrize(
    ("spread", "width", "even"), [(3000.0, None, False), (1e-3, None, False), (1e-3, 4, True)]
)
def test_large_and_small_values(
    spread: float, width: int | None, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values times the scale of their head, up to 4 here, exceed what fp16 holds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        emulate_decode(monkeypatch, multiprocessors=16)
    options = {"width": width, "even": even, "spread": spread, "seed": 1}
    error = error_of(64, 1, 64, 0.0025, torch.float16, [(3, 7), (1, 0)], device, **options)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("dim", "group", "size", "arch"),
    [(64, 3, 64, "sm_90"), (128, 1, 128, "sm_80"), (128, 1, 128, "sm_90"), (256, 8, 512, "sm_80")],
)
def test_compiles_without_a_gpu(dim: int, group: int, size: int, arch: str) -> None:
    """Which also compares the bytes of shared memory that Python counts."""
    pytest.importorskip("cuda.bindings.nvrtc")
    shape = DecodeShape(3, dim, group, size, torch.float16, True, 0.0025, allocated=True)
    assert len(compile_cubin(shape.source, shape.header(SHARED[arch]), arch)) > 10_000
