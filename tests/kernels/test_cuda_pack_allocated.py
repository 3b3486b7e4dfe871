"""The CUDA kernels that pack allocated codes against PyTorch: on a GPU, else emulated."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Packed
from kvquant.cache.layout import Layout
from kvquant.errors import NonFiniteTokens
from kvquant.formats.allocated_layer import AllocatedLayer, padded_levels
from kvquant.kernels import cuda_pack_allocated
from kvquant.kernels.cuda_build import KernelUnavailable, compile_cubin
from kvquant.kernels.cuda_header import cuda_header
from kvquant.kernels.cuda_pack_allocated import AllocatedPackShape, SideTables, midpoint_row
from kvquant.kernels.cuda_structs import PackSource, PackTarget
from kvquant.quantization.allocated_quant import AllocatedQuantizer
from kvquant.schemes.allocated import AllocatedCodec
from kvquant.study.schemes import AllocatedScheme
from tests.kernels.emulate import emulate
from tests.support.packing import same_outliers
from tests.support.quantizers import random_allocated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [torch.float16, torch.bfloat16]
SHAPE = AllocatedPackShape(128, 8, 64, torch.float16, True, False)

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Selects the kernels, emulated where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVQUANT_KERNELS", "auto")
        if DEVICE == "cpu":
            emulate(patch)
        yield


@contextlib.contextmanager
def pytorch() -> Iterator[None]:
    """Selects PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVQUANT_KERNELS", "pytorch")
        yield


def coarse(layer: AllocatedLayer) -> AllocatedLayer:
    """The layer with ranges [-1, 1] and even levels, so that coarse data often hits a midpoint."""
    levels = {w: (torch.arange(2**w) + 0.5) * 2.0 ** (1 - w) - 1.0 for w in range(1, 7)}
    zero, scale = torch.zeros_like(layer.key_zero), torch.ones_like(layer.key_scale)
    table = padded_levels(levels)
    return replace(
        layer, key_zero=zero, key_scale=scale, key_levels=table, value_levels=table.clone()
    )


def codec_of(
    layer: AllocatedLayer, outliers: float = 0.01, *, size: int = 64, **options: Any
) -> AllocatedCodec:
    spec = AllocatedScheme(kind="allocated", outliers=outliers, block_size=size, **options)
    return AllocatedCodec(spec, layer.to(DEVICE))


def tokens(
    kind: str, blocks: int, heads: int, size: int, dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[blocks, heads, size, dim]`, tokens first in memory."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, blocks, size, heads, dim, generator=generator)
    if kind == "coarse":
        x = (x * 8).round() / 16
        x *= 1 + 5 * (torch.rand(x.shape, generator=generator) < 0.02)
    elif kind == "one head":
        x[1, ..., heads // 2, :] *= 50
    elif kind == "constant tokens":
        x[:, :, ::3] = 0.5
        x[:, :, 1] = 0.0
        x[1, :, 1, 0, ::5] = -0.0
        x[1, :, 4] = -0.0
        x[1, :, 5:, 0] = 0.25
    elif kind == "tiny":
        x = x * 1e-7
    elif kind == "smallest":  # the reciprocal of a subnormal scale may be infinite
        x = (x * 2).round() * (2.0**-24 if dtype is torch.float16 else 2.0**-133)
    elif kind == "far":  # a range that is a few steps of the 16-bit type wide
        x[1] = 100.0 + x[1] * 0.05
    elif kind == "huge":
        x[1] = x[1].clamp(-1, 1) * 4000.0
        x[1, :, 2] = 4000.0
    k, v = x.to(dtype).to(DEVICE).transpose(2, 3)
    return k, v


SORTS = ["normal", "coarse", "one head", "constant tokens", "tiny", "smallest", "far", "huge"]


def same(mine: Packed, theirs: Packed) -> None:
    """Asserts that packed blocks are equal bit for bit, but for the order of a block's outliers."""
    for name, t in theirs.dense.items():
        assert torch.equal(mine.dense[name], t), name
    assert mine.sparse.keys() == theirs.sparse.keys()
    for name, slab in theirs.sparse.items():
        assert same_outliers(mine.sparse[name], slab)


def check(codec: AllocatedCodec, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Asserts that kernels pack what PyTorch packs."""
    codec.widen(50.0)  # room for many outliers
    with pytorch():
        assert codec.reserve(1, keys) is None
        theirs = codec.pack(keys, values)
    with kernels():
        assert codec.reserve(1, keys) is not None
        mine = codec.pack(keys, values)
    assert mine.bad is not None and int(mine.bad) == 0
    for slab in mine.sparse.values():
        assert slab.excess is not None and int(slab.excess) == 0
    same(mine, theirs)


# (heads, (dim, size), dtype, outliers, value_range): what the kernels are compiled for, which takes
# g++ a second each. Two stand for each shape, and together they have every other option.
FEW = [
    (1, (64, 64), torch.float16, 0.0, "token"),
    (2, (64, 64), torch.bfloat16, 0.01, "token-head"),
    (3, (128, 64), torch.float16, 0.01, "token-head"),
    (1, (128, 64), torch.bfloat16, 0.0, "token"),
    (2, (64, 128), torch.float16, 0.0, "token-head"),
    (3, (64, 128), torch.bfloat16, 0.01, "token"),
    (1, (256, 64), torch.float16, 0.01, "token"),
    (3, (256, 64), torch.bfloat16, 0.0, "token-head"),
]
COMPILED = (
    st.sampled_from(FEW)
    if DEVICE == "cpu"
    else st.tuples(
        st.integers(1, 3),
        st.sampled_from([shape for _, shape, *_ in FEW[::2]]),
        st.sampled_from(KINDS),
        st.sampled_from([0.0, 0.01]),
        st.sampled_from(["token", "token-head"]),
    )
)


@settings(max_examples=30 if DEVICE == "cpu" else 300, deadline=None)
@given(
    compiled=COMPILED,
    kind=st.sampled_from(SORTS),
    even=st.booleans(),
    rotation=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equal_to_pytorch(
    compiled: tuple[int, tuple[int, int], torch.dtype, float, Any],
    kind: str,
    even: bool,
    rotation: bool,
    seed: int,
) -> None:
    heads, shape, dtype, outliers, value_range = compiled
    options: dict[str, Any] = {"rotation": rotation, "value_range": value_range}
    dim, size = shape
    layer = random_allocated(heads, dim, scale=(1.5, 3.0), seed=seed)
    keys, values = tokens(kind, 2, heads, size, dim, dtype, seed)
    if kind == "huge" and not options["rotation"]:
        values = values * 16  # near the largest number of fp16
    if even:
        layer = coarse(layer)
    scale = layer.key_scale.clone()
    scale[:, ::7] = 0.0  # constant channels
    scale[:, 3] = -0.0
    zero = layer.key_zero.to(dtype).float()
    keys[:, :, ::2, ::7] = zero[:, None, ::7].to(keys)
    layer = replace(layer, key_zero=zero, key_scale=scale)
    check(codec_of(layer, outliers, size=size, **options), keys, values)


@pytest.mark.parametrize("width", range(1, 7))
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("even", [True, False])
def test_every_width(width: int, dtype: torch.dtype, even: bool) -> None:
    layer = random_allocated(2, 64, seed=width)
    for widths in (layer.key_widths, layer.value_widths):
        widths[:] = width
    if even:
        layer = coarse(layer)
    keys, values = tokens("coarse", 3, 2, 64, 64, dtype, width)
    check(codec_of(layer, 0.1), keys, values)


@pytest.mark.parametrize("rotation", [True, False])
def test_blocks_of_any_memory_layout(rotation: bool) -> None:
    codec = codec_of(random_allocated(2, 64, scale=(2.0, 3.0)), rotation=rotation)
    x = torch.randn(2, 1, 2, 64, 72, device=DEVICE).half()
    for at in (0, 1, 2, 8):
        check(codec, *x[..., at : at + 64])
    check(codec, *torch.randn(2, 1, 2, 64, 64, device=DEVICE).half().mT)
    flat = torch.randn(2 * 2 * 64 * 64 + 1, device=DEVICE).half()[1:]  # contiguous, yet between
    check(codec, *flat.view(2, 1, 2, 64, 64))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("blocks", "heads", "dim", "size", "dtype", "options"),
    [
        (1, 1, 128, 64, torch.float16, {}),
        (150, 8, 128, 64, torch.float16, {}),
        (100, 32, 128, 64, torch.bfloat16, {"rotation": False}),
        (37, 40, 128, 64, torch.float16, {"value_range": "token-head"}),
        (20, 28, 64, 128, torch.float16, {}),
        (9, 64, 256, 64, torch.bfloat16, {}),
        (5, 4, 256, 512, torch.float16, {}),
        (3, 200, 64, 64, torch.float16, {}),  # more heads than multiprocessors
    ],
)
@pytest.mark.parametrize("kind", SORTS)
def test_whole_layers_on_a_gpu(
    blocks: int, heads: int, dim: int, size: int, dtype: torch.dtype, options: dict[str, Any],
    kind: str,
) -> None:  # fmt: skip
    keys, values = tokens(kind, blocks, heads, size, dim, dtype, heads)
    layer = random_allocated(heads, dim, scale=(2.5, 3.5), seed=heads)
    if kind == "coarse":
        layer = coarse(layer)
    codec = codec_of(layer, 0.0025, size=size, **options)
    check(codec, keys, values)
    check(codec, keys[blocks // 2 :].contiguous(), values[blocks // 2 :].contiguous())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("heads", [1, 8, 32, 128])
def test_thread_blocks_wait_for_each_other(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are read once, beside keys and often, equal those of two launches."""
    # Room for all outliers: which of them are lost where there is too little is not determined.
    codec = codec_of(random_allocated(heads, 128, scale=(2.5, 3.5)), 0.02, rotation=False)
    x = torch.randn(2, 8192 // heads, heads, 64, 128, device=DEVICE, dtype=torch.float16)
    with kernels():
        packed = [codec.pack(*x) for _ in range(20)]
        monkeypatch.setattr(cuda_pack_allocated, "multiprocessors", lambda index: 0)
        twice = codec.pack(*x)
    for mine in packed:
        same(mine, twice)


def test_long_blocks_have_one_list_of_outliers() -> None:
    layer = random_allocated(2, 64, scale=(1.0, 2.0))
    keys, values = tokens("normal", 2, 2, 512, 64, torch.float16, 0)
    check(codec_of(layer, 0.1, size=512), keys, values)
    keys, values = tokens("normal", 1, 1, 1024, 256, torch.bfloat16, 0)
    layer = random_allocated(1, 256, scale=(1.0, 2.0))
    check(codec_of(layer, 0.1, size=1024), keys, values)  # positions and counts of 32 bits


@pytest.mark.thinned(5)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("value_range", ["token", "token-head"])
def test_not_a_number_is_noticed(
    wrong: float, where: int, outliers: float, many: bool, value_range: Any
) -> None:
    codec = codec_of(random_allocated(4, 64), outliers, rotation=False, value_range=value_range)
    x = torch.randn(2, 1, 4, 64, 64, device=DEVICE).half()
    if many:
        x[where] = wrong
    else:
        x[where, 0, 1, 7, 9] = wrong
    with kernels():
        bad = codec.pack(x[0], x[1]).bad
        assert bad is not None and int(bad) == 1
    if DEVICE == "cpu":
        with pytorch(), pytest.raises(NonFiniteTokens):
            codec.pack(x[0], x[1])


def test_what_finds_no_room_is_counted() -> None:
    codec = codec_of(random_allocated(2, 64))
    x = torch.full((4, 2, 64, 64), 6000.0, dtype=torch.float16, device=DEVICE)
    x[:, 0, :, :3] = 0.1
    with kernels():
        slab = codec.pack(x, x).sparse["keys"]
    expected = codec.quantizer._encode_keys(x)[1]
    assert expected is not None and slab.excess is not None
    assert int(slab.excess) == int(expected.sum()) - slab.values.numel() > 0
    assert slab.nnz == slab.values.numel()
    index, value = slab.coordinates()
    assert torch.equal(x.reshape(-1)[index], value)
    assert index.unique().numel() == index.numel()


def test_room_for_what_the_codec_keeps() -> None:
    layer = random_allocated(2, 64)
    keys, _ = tokens("normal", 5, 2, 64, 64, torch.float16, 0)
    for value_range, each in (("token", (64,)), ("token-head", (2, 64))):
        codec = codec_of(layer, 0.004, value_range=value_range)
        codec.widen(2.0)
        with kernels():
            room = codec.reserve(5, keys)
        assert room is not None and room.reserved and room.blocks == 5
        with pytorch():
            packed = codec.pack(keys, keys)
        for name, t in packed.dense.items():
            assert (room.dense[name].shape, room.dense[name].dtype) == (t.shape, t.dtype)
        assert room.dense["zero"].shape == (5, *each)
        assert room.sparse["keys"].values.numel() == codec.quantizer.key_slots(keys.numel())
    with kernels():
        clipping = codec_of(layer, 0.0).reserve(5, keys)
    assert clipping is not None and clipping.sparse == {}


def fill(codec: AllocatedCodec, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, Any]:
    """A store that got a chunk, a token and a chunk, in two ragged sequences."""
    store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, codec.residual)
    for part in (slice(0, 140), slice(140, 141), slice(141, 300)):
        columns = part.stop - part.start
        plan = layout.append([slice(0, columns), slice(0, max(columns - 9, 1))])
        store.append(plan, keys[:, :, part], values[:, :, part])
    return store, layout


@pytest.mark.parametrize("value_range", ["token", "token-head"])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
def test_a_cache_holds_the_same_without_kernels(value_range: Any, outliers: float) -> None:
    layer = random_allocated(2, 64, scale=(2.0, 3.0))
    keys, values = torch.randn(2, 2, 2, 300, 64, device=DEVICE).half()
    codec = codec_of(layer, outliers, value_range=value_range)
    with kernels():
        store, layout = fill(codec, keys, values)
    with pytorch():
        other, _ = fill(codec, keys, values)
    assert store.packed_by_kernels and not other.packed_by_kernels
    assert store.arena_table() is not None
    assert store.status is not None and store.status.tolist() == [0, 0]

    def without_entries(s: BlockStore) -> int:
        slabs = [slab for arena in s.arenas for slab in arena.sparse.values()]
        return s.nbytes - sum(t.nbytes for x in slabs for t in (*x._positions, *x._values))

    assert without_entries(store) == without_entries(other)
    for table in layout.table:
        assert table
        for arena, place in table:
            at = slice(place, place + 1)
            for mine, theirs in zip(store.unpack(arena, at), other.unpack(arena, at), strict=True):
                assert torch.equal(mine, theirs)


def test_levels_that_are_not_even_are_refused() -> None:
    even = torch.linspace(-0.7, 0.9, 16)
    row = midpoint_row(even, 4, of_keys=True)
    assert row.numel() == 2 + 15
    ends = row[0] * row[[2, -1]] + row[1]
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    falling = midpoint_row(torch.linspace(-0.7, 0.9, 32), 5, of_keys=True)
    ends = falling[0] * falling[[2, -1]] + falling[1]
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    even[3] += 0.05
    for levels in (even, torch.full((16,), 0.5)):
        with pytest.raises(ValueError, match="levels of width 4 are not evenly spaced"):
            midpoint_row(levels, 4, of_keys=True)
    assert midpoint_row(even, 4, of_keys=False).numel() == 2 + 15  # looked up
    assert midpoint_row(torch.tensor([-1.0, -0.9, 0.0, 1.0]), 2, of_keys=True).numel() == 2 + 3


def test_tables_of_keys() -> None:
    layer = random_allocated(3, 64)
    tables = AllocatedQuantizer(layer, outliers=0.0, rotation=True, per_head=False)._tables
    rows = layer.key_rows()
    for side, widths in zip(
        tables, (rows.tile_widths, layer.value_rows().tile_widths), strict=True
    ):
        assert side.tiles[..., 0].tolist() == widths
        assert side.planes == sum(map(sum, widths))
        assert side.tiles[-1, -1, [1, 2]].sum() + widths[-1][-1] == side.planes
    keys = tables[0]
    assert keys.ranges is not None and keys.channels is not None
    for h, tile, t in ((0, 0, 0), (2, 3, 1), (1, 2, 3)):
        channels = rows.channels[h, tile].tolist()
        pair = int(keys.channels[h, tile, t])
        assert (pair & 0xFFFF, pair >> 16) == tuple(channels[2 * t : 2 * t + 2])
        found = keys.ranges[h, tile, 1, t, :2]
        assert torch.equal(found, layer.key_zero[h, channels[8 + 2 * t : 10 + 2 * t]])
    assert tables[1].ranges is None and isinstance(tables[1], SideTables)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("shape", "arch"),
    [
        (SHAPE, "sm_80"),
        (SHAPE, "sm_90"),
        (AllocatedPackShape(64, 5, 128, torch.bfloat16, False, True), "sm_80"),
        (AllocatedPackShape(256, 64, 1024, torch.bfloat16, True, False), "sm_90"),
    ],
)
def test_compiles_without_a_gpu(shape: AllocatedPackShape, arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    assert len(compile_cubin("pack_allocated.cu", shape.header(), arch)) > 10_000


def test_a_swapped_field_is_refused() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    fields = list(cuda_pack_allocated.PackTables._fields_)
    fields[0], fields[1] = fields[1], fields[0]
    swapped = type("PackTables", (ctypes.Structure,), {"_fields_": fields})
    header = cuda_header(SHAPE.constants(), (PackSource, PackTarget, swapped))
    with pytest.raises(KernelUnavailable, match="not as in Python's PackTables"):
        compile_cubin("pack_allocated.cu", header, "sm_80")


@pytest.mark.parametrize("value_range", ["token", "token-head"])
def test_blocks_are_read_where_they_lie(value_range: Any) -> None:
    """A ragged batch in one call holds what each of its sequences holds alone."""
    layer = random_allocated(2, 64, seed=5)
    x = torch.randn(2, 3, 300, 2, 64, generator=torch.Generator().manual_seed(3)).half()
    keys, values = x.to(DEVICE).transpose(2, 3)
    spans = [slice(0, 300), slice(171, 300), slice(3, 140)]

    def stored(rows: list[int]) -> list[list[torch.Tensor]]:
        codec = codec_of(layer, 0.02, value_range=value_range)
        codec.widen(50.0)
        store, layout = BlockStore(codec), Layout(codec.sinks, 64, 0)
        store.append(layout.append([spans[b] for b in rows]), keys[rows], values[rows])
        return [
            [part for arena, at in table for part in store.unpack(arena, slice(at, at + 1))]
            for table in layout.table
        ]

    with kernels():
        together = stored([0, 1, 2])
        for b, mine in enumerate(together):
            (alone,) = stored([b])
            assert len(mine) == len(alone) > 0
            assert all(map(torch.equal, mine, alone))
    with pytorch():
        for mine, theirs in zip(together, stored([0, 1, 2]), strict=True):
            assert all(map(torch.equal, mine, theirs))
