"""The CUDA decode kernel against attention in float64 over what the PyTorch path unpacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.kernels.cuda_build import KernelUnavailable, compile_cubin
from kvquant.kernels.cuda_decode import (
    DecodeShape,
    functions,
    plan_splits,
)
from kvquant.kernels.cuda_header import cuda_header
from tests.kernels.emulate import emulate_decode
from tests.support.decode_case import TOLERANCE, decode_error

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


# A cap that squeezes most scores, and learned logits of attention sinks.
SINKS: dict[str, Any] = {"learned": True}
CAPPED: dict[str, Any] = {"soft_cap": 1.5, **SINKS}
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}


@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.02])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (128, 1), (128, 4), (256, 8)])
class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("size", "more"), [(32, {}), (64, {}), (128, {}), (64, CAPPED)])
    def test_close_to_float64(
        self, bits: int, dim: int, group: int, size: int, outliers: float, more: dict[str, Any]
    ) -> None:
        lengths = [(0, 1), (1, size - 1), (7, 0), (40, size)]
        error = decode_error(bits, dim, group, size, outliers, torch.float16, lengths, **more)
        assert error < TOLERANCE[torch.float16]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("bits", "dim", "group", "size", "outliers", "dtype", "more"),
    [
        (3, 128, 4, 64, 0.01, torch.float16, {}),
        (3, 128, 1, 512, 0.02, torch.float16, {}),
        (2, 64, 3, 32, 0.02, torch.float16, {}),
        (4, 256, 8, 128, 0.01, torch.bfloat16, {}),
        (4, 64, 8, 64, 0.0, torch.float16, {}),
        (3, 256, 2, 64, 0.01, torch.float16, CAPPED),  # Gemma 2 has caps alone
        (3, 64, 8, 64, 0.01, torch.bfloat16, SINKS),  # as GPT-OSS
    ],
)
def test_source_on_a_cpu(
    bits: int,
    dim: int,
    group: int,
    size: int,
    outliers: float,
    dtype: torch.dtype,
    more: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's source, compiled for a CPU: no sequence, one block, several splits."""
    emulate_decode(monkeypatch, multiprocessors=16)
    lengths = [(0, 1), (1, size - 1), (7, 0), (12 if size < 512 else 2, size)]
    error = decode_error(
        bits, dim, group, size, outliers, dtype, lengths, heads=2, device="cpu", **more
    )
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [1, 4])
def test_an_outlier_in_every_token_of_a_thread_block(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of thousands of large parts stay within the integers that they are made of."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        emulate_decode(monkeypatch)  # one multiprocessor: the largest splits
    error = decode_error(
        3, 128, group, 64, 0.01, torch.float16, [(64, 1)], heads=1, device=device, column=60.0
    )
    assert error < TOLERANCE[torch.float16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["bf16", "long", "one", "sinks", "yarn", "wide", "capped"])
def test_special_cases(case: str) -> None:
    lengths = {"long": [(513, 3), (2, 60)], "one": [(0, 1)]}.get(case, [(3, 5), (0, 64)])
    dtype = torch.bfloat16 if case == "bf16" else torch.float16
    error = decode_error(
        3, 128, 4 if case == "long" else 1, 64, 0.01, dtype, lengths,
        sinks={"sinks": 4, "wide": 0}.get(case, 1),
        factor=1.3 if case == "yarn" else 1.0,
        spread=30.0 if case == "wide" else 1.0,
        seed=3,
        **CAPPED if case in ("capped", "long") else {},
    )  # fmt: skip
    assert error < TOLERANCE[dtype]


def test_scores_beyond_the_range_of_an_exponential_are_capped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exponential of the cap's tangent is infinite for them, or zero."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        emulate_decode(monkeypatch)
    more: dict[str, Any] = {"heads": 1, "device": device, "soft_cap": 0.005}
    error = decode_error(3, 64, 2, 64, 0.01, torch.float16, [(2, 5)], **more)
    assert error < TOLERANCE[torch.float16]


# Beside these, `test_shared_memory_is_what_the_kernel_takes` compiles 3 bits for sm_90.
@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("bits", "soft_cap", "arch"),
    [(2, None, "sm_90"), (3, None, "sm_80"), (4, None, "sm_80"), (3, 50.0, "sm_90")],
)
def test_compiles_without_a_gpu(bits: int, soft_cap: float | None, arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    shape = DecodeShape(bits, 128, 4, 64, torch.float16, True, soft_cap=soft_cap)
    assert len(compile_cubin("decode.cu", shape.header(SHARED[arch]), arch)) > 10_000


def test_a_compile_error_is_told() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(KernelUnavailable, match=r"decode\.cu"):
        compile_cubin("decode.cu", cuda_header({"BITS": 3}, ()), "sm_90")


@pytest.mark.parametrize(("batch", "chunks"), [(1, 256), (16, 256), (1, 2048), (4, 1), (64, 3)])
def test_splits_cover_all_chunks(batch: int, chunks: int) -> None:
    each, splits = plan_splits(batch, 8, chunks, 132, 16, 4)
    assert each % 4 == 0 and each <= 16
    assert (splits - 1) * each < chunks <= splits * each


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (128, 1), (128, 4), (256, 8)])
@pytest.mark.parametrize("size", [32, 64, 128, 512])
def test_room_in_shared_memory(bits: int, dim: int, group: int, size: int) -> None:
    shape = DecodeShape(bits, dim, group, size, torch.float16, True)
    for shared in SHARED.values():
        split = shape.split(shared)
        assert split % shape.warps == 0 and split * shape.chunk % size == 0
        assert shape.smem_bytes(split) <= shared - 1024


@pytest.mark.parametrize(("dim", "group", "size"), [(64, 3, 32), (256, 8, 512), (128, 1, 128)])
def test_shared_memory_is_what_the_kernel_takes(dim: int, group: int, size: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    shape = DecodeShape(3, dim, group, size, torch.float16, True)
    header, constants = shape.header(SHARED["sm_90"]), shape.constants(SHARED["sm_90"])
    compile_cubin("decode.cu", header, "sm_90")
    wrong = header.replace(
        f"SMEM_BYTES = {constants['SMEM_BYTES']};", f"SMEM_BYTES = {constants['SMEM_BYTES'] - 256};"
    )
    with pytest.raises(KernelUnavailable, match="counts other bytes"):
        compile_cubin("decode.cu", wrong, "sm_90")


def test_functions_need_a_gpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            functions(DecodeShape(3, 128, 1, 64, torch.float16, True), 0)
