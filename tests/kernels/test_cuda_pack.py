"""The CUDA packing kernels against the PyTorch path: on a GPU, else emulated on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvquant.kernels.block_places import gathered
from kvquant.kernels.cuda_build import compile_cubin
from kvquant.kernels.cuda_pack import PackShape, tokens_per_block
from kvquant.quantization.batched_quant import BatchedKVQuantizer
from tests.kernels.emulate import emulate
from tests.support.packing import check_packed, check_shared_arena, pack_at
from tests.support.quantizers import random_quantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", "auto")
    if DEVICE == "cpu":
        emulate(monkeypatch)


def make(
    heads: int, dim: int, bits: int, outliers: float, seed: int = 0, spread: float = 2.7
) -> BatchedKVQuantizer:
    tables = random_quantizer(
        heads, dim, bits, scale=(spread, spread + 1), values="uniform", seed=seed
    )
    tables.key_scale[0, :3] = 0.0  # constant channels
    return BatchedKVQuantizer(tables.to(DEVICE), bits, outliers)


def tokens(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[blocks, heads, size, dim]`, tokens first in memory."""
    generator = torch.Generator().manual_seed(seed)
    heads = shape[2]
    x = torch.randn(2, *shape, generator=generator)
    if kind == "coarse":
        x = (x * 2).round() / 2
    elif kind == "one head":
        x[1, ..., heads // 2, :] *= 50
    elif kind == "constant tokens":
        x[:, :, ::3] = 0.5
        x[:, :, 1] = 0.0
        x[1, :, 1, 0, ::5] = -0.0
    elif kind == "tiny":
        x = x * 1e-7
    elif kind == "far":  # a range that is a few steps of the 16-bit type wide
        x[1] = 100.0 + x[1] * 0.05
    elif kind == "huge":
        x[1] = x[1].clamp(-1, 1) * 65504.0
        x[1, :, 2] = 65504.0
    elif kind == "ends in one thread":
        x[1, ..., 0, ::8] += 20.0
        x[1, ..., 0, 1::8] -= 20.0
    k, v = x.to(dtype).to(DEVICE).transpose(2, 3)
    return k, v


def check(quantizer: BatchedKVQuantizer, keys: torch.Tensor, values: torch.Tensor) -> None:
    assert quantizer.backend(keys, values) == "cuda"
    check_packed(quantizer, keys, values)


SORTS = ["normal", "coarse", "one head", "constant tokens", "tiny", "far", "huge",
         "ends in one thread"]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", SORTS)
@pytest.mark.parametrize(
    ("bits", "heads", "dim", "size", "outliers", "dtype"),
    [
        (3, 8, 128, 32, 0.01, torch.float16),
        (4, 5, 64, 32, 0.02, torch.bfloat16),
        (2, 3, 256, 16, 0.0, torch.float16),
        (2, 1, 64, 32, 0.03, torch.float16),
    ],
)
def test_equal_to_pytorch(
    kind: str, bits: int, heads: int, dim: int, size: int, outliers: float, dtype: torch.dtype
) -> None:
    keys, values = tokens(kind, (3, size, heads, dim), dtype, bits)
    check(make(heads, dim, bits, outliers), keys, values)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("bits", "heads", "dim", "outliers", "dtype"),
    [
        (2, 1, 128, 0.02, torch.float16),
        (4, 8, 128, 0.01, torch.float16),
        (3, 8, 128, 0.01, torch.bfloat16),
        (3, 32, 128, 0.01, torch.float16),
        (3, 32, 128, 0.0, torch.float16),
        (4, 32, 128, 0.02, torch.bfloat16),
        (3, 32, 128, 0.04, torch.float16),
        (2, 28, 64, 0.01, torch.float16),
        (3, 40, 128, 0.01, torch.bfloat16),
        (3, 64, 256, 0.01, torch.float16),
        (4, 4, 256, 0.0, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", SORTS)
def test_whole_layers_on_a_gpu(
    bits: int, heads: int, dim: int, outliers: float, dtype: torch.dtype, kind: str
) -> None:
    size = 64 if dim < 256 else 128
    keys, values = tokens(kind, (37, size, heads, dim), dtype, heads)
    check(make(heads, dim, bits, outliers), keys, values)
    check(make(heads, dim, bits, outliers), keys[2:3].contiguous(), values[2:3].contiguous())


def test_several_tokens_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvquant.kernels import cuda_pack

    monkeypatch.setattr(cuda_pack, "tokens_per_block", lambda *_: 7)
    for kind in ("normal", "constant tokens"):
        keys, values = tokens(kind, (2, 32, 8, 128), torch.float16, 9)
        check(make(8, 128, 3, 0.01), keys, values)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
@pytest.mark.parametrize("many", [False, True])
def test_not_a_number_is_noticed(wrong: float, where: int, outliers: float, many: bool) -> None:
    quantizer = make(4, 64, 4, outliers)
    x = torch.randn(2, 1, 4, 32, 64, device=DEVICE).half()
    if many:
        x[where] = wrong
    else:
        x[where, 0, 1, 7, 9] = wrong
    packed = quantizer.kernel_pack(x[0], x[1])
    assert packed is not None
    assert int(packed[2]) == 1


def test_what_finds_no_room_is_counted() -> None:
    quantizer = make(2, 64, 3, 0.01)
    x = torch.full((4, 2, 64, 64), 60000.0, dtype=torch.float16, device=DEVICE)
    x[:, 0, :, :3] = 0.1
    packed = quantizer.kernel_pack(x, x)
    assert packed is not None
    outliers = packed[0].outliers
    assert outliers is not None
    assert outliers.excess is not None
    expected = quantizer._encode_keys(x)[1]
    assert expected is not None
    assert int(outliers.excess) == int(expected.sum()) - outliers.values.numel()
    assert outliers.nnz == outliers.values.numel()
    index, value = outliers.coordinates()
    assert torch.equal(x.reshape(-1)[index], value)


@pytest.mark.parametrize("slots", [40, 4000])
def test_appends_share_an_arena(slots: int) -> None:
    check_shared_arena(make(2, 64, 3, 0.02), 32, slots)


def test_what_does_not_lie_even_is_left_to_others() -> None:
    quantizer = make(1, 64, 3, 0.01)
    odd = torch.randn(1, 1, 32, 65, device=DEVICE).half()
    assert quantizer.backend(odd[..., :64], odd[..., :64]) != "cuda"
    even = torch.randn(1, 1, 32, 66, device=DEVICE).half()[..., 2:]
    check(quantizer, even, even)


@pytest.mark.parametrize(
    ("shape", "arch"),
    [
        (PackShape(3, 128, 32, 64, torch.float16, True, 20), "sm_80"),
        (PackShape(3, 128, 32, 64, torch.float16, True, 20), "sm_90"),
        (PackShape(2, 64, 5, 128, torch.bfloat16, False, 0), "sm_90"),
        (PackShape(4, 256, 64, 32, torch.bfloat16, True, 82), "sm_80"),
    ],
)
def test_compiles_without_a_gpu(shape: PackShape, arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    assert len(compile_cubin("pack.cu", shape.header(), arch)) > 10_000


def test_a_program_takes_several_tokens_only_where_there_are_many() -> None:
    assert tokens_per_block(64, 132, 128) == 1
    assert tokens_per_block(16384, 132, 128) >= 1
    assert np.all(np.diff([tokens_per_block(n, 132, 128) for n in range(64, 10**6, 9999)]) >= 0)


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_blocks_are_read_where_they_lie(outliers: float) -> None:
    """Blocks of several sequences, from any column, give what the same blocks give side by side."""
    quantizer = make(3, 64, 3, outliers)
    x = torch.randn(2, 2, 90, 3, 64, generator=torch.Generator().manual_seed(3)).half()
    keys, values = x.to(DEVICE).transpose(2, 3)
    where = [[1, 7], [0, 1], [1, 39], [0, 58]]
    places = torch.tensor(where, dtype=torch.int32, device=DEVICE)
    found, expected = (
        pack_at(quantizer, *blocks)
        for blocks in (
            (keys, values, places),
            (*(gathered(t, places, 32).contiguous() for t in (keys, values)), None),
        )
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
