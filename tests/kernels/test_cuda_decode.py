"""The CUDA decode kernel against attention in float64 over what the PyTorch path unpacks."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kvquant.cache.arena import Arena
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels.arena_table import block_number
from kvquant.kernels.cuda_build import KernelUnavailable, compile_cubin
from kvquant.kernels.cuda_decode import (
    DecodeShape,
    DecodeStep,
    decode_attention,
    functions,
    plan_splits,
)
from kvquant.kernels.decode_tables import RopeTables
from kvquant.quantization.nuq import fit
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.config import NuqScheme
from tests.kernels.emulate import emulate_decode

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def rope(positions: torch.Tensor, dim: int, factor: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Llama's table, `[1, n, dim]` each, computed in float64."""
    inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=positions.device).double() / dim)
    angles = positions[..., None].double() * inverse
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`[heads, dim]` of queries `[heads, dim]` and rotated keys `[kv_heads, n, dim]`, float64."""
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    weights = torch.softmax((keys @ query[..., None])[..., 0] * scaling, -1)
    return (weights[:, None] @ values)[:, 0]


def run_case(
    bits: int,
    dim: int,
    group: int,
    size: int,
    outliers: float,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    heads: int = 2,
    sinks: int = 1,
    factor: float = 1.0,
    spread: float = 1.0,
    seed: int = 0,
    device: str = "cuda",
    column: float = 0.0,
) -> float:
    """Largest relative error, by sequence and head, of sequences of (blocks, tail) tokens.

    With a `column` a channel of all values has that number, and all tokens weigh the same.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    tables = LayerQuantizer(
        torch.randn(heads, dim) * 0.3,
        torch.rand(heads, dim) + 2.2 if outliers else torch.full((heads, dim), 5.0),
        fit("nf", bits),
        fit("nf", bits),
    ).to(device)
    spec = NuqScheme(kind="nuq", bits=bits, outliers=outliers, block_size=size)
    codec = NuqCodec(spec, tables)
    total = sum(n for n, _ in lengths)
    batch = len(lengths)
    x = torch.randn(2, max(total, 1), heads, size, dim, device=device)
    x[0] += tables.key_zero[:, None]
    x[1] *= spread
    x[1, :, :, 3] += 7.0  # a token far from zero
    x[:, :, :, 5] = 0.25  # a constant one
    if column:
        x[1, ..., 7] = column
    x = x.to(dtype)
    # Two arenas, filled in disorder.
    order = random.sample(range(max(total, 1)), max(total, 1))
    cut = max(1, len(order) // 3)
    arenas = []
    for part in (order[:cut], order[cut:] or order[:1]):
        packed = codec.pack(x[0, part], x[1, part])
        arenas.append(Arena(len(part), packed))
    where = {b: (0, i) for i, b in enumerate(order[:cut])}
    where |= {b: (1, i) for i, b in enumerate(order[cut:])}
    rows = torch.tensor([a.addresses for a in arenas], device=device)
    most = max(n for n, _ in lengths)
    table = torch.zeros(batch, most + 2, dtype=torch.int32, device=device)
    at = 0
    pieces: list[list[int]] = []
    for b, (n, _) in enumerate(lengths):
        pieces.append(list(range(at, at + n)))
        for i, block in enumerate(pieces[-1]):
            table[b, i] = block_number(*where[block])
        at += n
    room = size
    held = torch.randn(2, batch, heads, sinks + room, dim, device=device).to(dtype)
    sink = (held[0, :, :, :sinks].contiguous(), held[1, :, :, :sinks].contiguous())
    tail = (held[0, :, :, sinks:].contiguous(), held[1, :, :, sinks:].contiguous())
    numbers = torch.tensor([(sinks, n, t) for n, t in lengths], dtype=torch.int32, device=device)
    shape = DecodeShape(bits, dim, group, size, dtype, outliers > 0)
    assert shape.refusal() is None
    chunks = most * (size // shape.chunk)
    made = RopeTables.make(
        lambda p: rope(p, dim, factor), shape.chunk, sinks, chunks + size // shape.chunk, table
    )
    step = DecodeStep(table, numbers, chunks, made)
    query = torch.randn(batch, heads * group, dim, device=device).to(dtype) * (not column)
    scaling = 1 / math.sqrt(dim)
    out = decode_attention(
        shape, query, sink, tail, rows, step, codec.decode_tables, scaling
    ).double()
    worst = 0.0
    for b, (_, t) in enumerate(lengths):
        parts = [(sink[0][b], sink[1][b])]
        for block in pieces[b]:
            arena, place = where[block]
            view = arenas[arena].view(slice(place, place + 1))
            k, v = codec.unpack(view, (1, heads, size, dim))
            parts.append((k[0], v[0]))
        parts.append((tail[0][b, :, :t], tail[1][b, :, :t]))
        keys = torch.cat([k.double() for k, _ in parts], 1)
        values = torch.cat([v.double() for _, v in parts], 1)
        cos, sin = rope(torch.arange(keys.shape[1], device=device)[None], dim, factor)
        expected = reference(
            query[b].double(), turn(keys, cos[0].double(), sin[0].double()), values, scaling
        )
        error = (out[b] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert not error.isnan().any()
        worst = max(worst, float(error.max()))
    return worst


SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}

# fp16 operands: errors of 2^-11 in keys and queries make about that in the scores.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.02])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (128, 1), (128, 4), (256, 8)])
class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("size", [32, 64, 128])
    def test_close_to_float64(
        self, bits: int, dim: int, group: int, size: int, outliers: float
    ) -> None:
        lengths = [(0, 1), (1, size - 1), (7, 0), (40, size)]
        error = run_case(bits, dim, group, size, outliers, torch.float16, lengths)
        assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("bits", "dim", "group", "size", "outliers", "dtype"),
    [
        (3, 128, 4, 64, 0.01, torch.float16),
        (3, 128, 1, 512, 0.02, torch.float16),
        (2, 64, 3, 32, 0.02, torch.float16),
        (4, 256, 8, 128, 0.01, torch.bfloat16),
        (4, 64, 8, 64, 0.0, torch.float16),
    ],
)
def test_source_on_a_cpu(
    bits: int,
    dim: int,
    group: int,
    size: int,
    outliers: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's source, compiled for a CPU: no sequence, one block, several splits."""
    emulate_decode(monkeypatch, multiprocessors=16)
    lengths = [(0, 1), (1, size - 1), (7, 0), (12 if size < 512 else 2, size)]
    error = run_case(bits, dim, group, size, outliers, dtype, lengths, heads=2, device="cpu")
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [1, 4])
def test_an_outlier_in_every_token_of_a_program(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of thousands of large parts stay within the integers that they are made of."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        emulate_decode(monkeypatch)  # one multiprocessor: programs as long as they come
    error = run_case(
        3, 128, group, 64, 0.01, torch.float16, [(64, 1)], heads=1, device=device, column=60.0
    )
    assert error < TOLERANCE[torch.float16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["bf16", "long", "one", "sinks", "yarn", "wide"])
def test_special_cases(case: str) -> None:
    lengths = {"long": [(513, 3), (2, 60)], "one": [(0, 1)]}.get(case, [(3, 5), (0, 64)])
    dtype = torch.bfloat16 if case == "bf16" else torch.float16
    error = run_case(
        3, 128, 4 if case == "long" else 1, 64, 0.01, dtype, lengths,
        sinks={"sinks": 4, "wide": 0}.get(case, 1),
        factor=1.3 if case == "yarn" else 1.0,
        spread=30.0 if case == "wide" else 1.0,
        seed=3,
    )  # fmt: skip
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compiles_without_a_gpu(bits: int, arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    shape = DecodeShape(bits, 128, 4, 64, torch.float16, True)
    assert len(compile_cubin("decode.cu", shape.constants(SHARED[arch]), arch)) > 10_000


def test_a_compile_error_is_told() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(KernelUnavailable, match=r"decode\.cu"):
        compile_cubin("decode.cu", {"BITS": 3}, "sm_90")


def test_what_the_kernel_does_not_take_is_named() -> None:
    assert DecodeShape(3, 80, 1, 64, torch.float16, True).refusal() == (
        "head_dim 80 is none of 64, 128, 256"
    )
    assert "16 query heads" in str(DecodeShape(3, 128, 16, 64, torch.float16, True).refusal())


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
        assert shape.space_bytes(split) <= shared - 1024


@pytest.mark.parametrize(("dim", "group", "size"), [(64, 3, 32), (256, 8, 512), (128, 1, 128)])
def test_shared_memory_is_what_the_kernel_takes(dim: int, group: int, size: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    constants = DecodeShape(3, dim, group, size, torch.float16, True).constants(SHARED["sm_90"])
    compile_cubin("decode.cu", constants, "sm_90")
    with pytest.raises(KernelUnavailable, match="counts other bytes"):
        compile_cubin("decode.cu", constants | {"SPACE": constants["SPACE"] - 256}, "sm_90")


def test_functions_need_a_gpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            functions(DecodeShape(3, 128, 1, 64, torch.float16, True), 0)
