"""The quantizer of allocated codes against loops over single elements, and its extremes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import NonFiniteTokens
from kvquant.formats.allocated_layer import AllocatedLayer, padded_levels
from kvquant.quantization.allocated_quant import AllocatedQuantizer
from kvquant.quantization.hadamard import rotate
from kvquant.schemes.allocated import AllocatedCodec
from kvquant.study.schemes import AllocatedScheme
from tests.support.quantizers import assert_fake_is_packed, random_allocated, relative_error

FP32 = np.float32
DIMS = [16, 64, 80, 128, 256]
KINDS = [torch.float16, torch.bfloat16]


def made(
    layer: AllocatedLayer, outliers: float = 0.01, *, rotation: bool = True, per_head: bool = False
) -> AllocatedQuantizer:
    return AllocatedQuantizer(layer, outliers=outliers, rotation=rotation, per_head=per_head)


def coarse_layer(heads: int, dim: int, seed: int) -> AllocatedLayer:
    """Ranges [-1, 1] and evenly spaced levels, so that coarse data often hits a midpoint."""
    levels = {w: (torch.arange(2**w) + 0.5) * 2.0 ** (1 - w) - 1.0 for w in range(1, 7)}
    table = padded_levels(levels)
    ranges = {"key_zero": torch.zeros(heads, dim), "key_scale": torch.ones(heads, dim)}
    layer = random_allocated(heads, dim, seed=seed)
    return replace(layer, key_levels=table, value_levels=table, **ranges)


def data(shape: tuple[int, ...], seed: int, kind: torch.dtype = torch.float16) -> torch.Tensor:
    """Normal numbers in steps of 1/16, with outliers, empty tokens and empty heads of tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 8).round() / 16
    x *= 1 + 5 * (torch.rand(shape, generator=generator) < 0.02)
    kept = torch.rand(shape[0], 1, shape[2], 1, generator=generator) < 0.85
    head = torch.rand(*shape[:3], 1, generator=generator) < 0.85
    return (x * kept * head).to(kind)


def code_of(x: float, levels: list[float]) -> int:
    """The number of midpoints, rounded to fp32, below an element: none for NaN."""
    return sum(x > float((FP32(a) + FP32(b)) * FP32(0.5)) for a, b in itertools.pairwise(levels))


def levels_of(table: torch.Tensor, width: float) -> list[float]:
    return table[int(width) - 1, : 2 ** int(width)].tolist()


Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def keys_by_loops(x: torch.Tensor, layer: AllocatedLayer, outliers: float) -> Found:
    """Codes, outliers and keys read back of `[blocks, heads, size, head_dim]`."""
    codes, mask = torch.zeros(x.shape, dtype=torch.uint8), torch.zeros(x.shape, dtype=torch.bool)
    out = x.float()
    pairs = x.shape[3] // 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for head in range(x.shape[1]):
            order = layer.key_pairs[head].tolist()
            for channel in range(2 * pairs):
                tile = order.index(channel % pairs) // 8
                levels = levels_of(layer.key_levels, float(layer.key_widths[head, tile]))
                zero = FP32(float(layer.key_zero[head, channel]))
                scale = FP32(abs(float(layer.key_scale[head, channel])))  # -0 is 0
                for block, token in np.ndindex(x.shape[0], x.shape[2]):
                    at = (block, head, token, channel)
                    normalized = (FP32(float(x[at])) - zero) * (FP32(1) / scale)
                    codes[at] = code = code_of(float(normalized), levels)
                    if outliers > 0 and abs(normalized) > 1:
                        mask[at] = True  # exact
                    else:
                        out[at] = float(FP32(levels[code]) * scale + zero)
    return codes, mask, out


def values_by_loops(
    x: torch.Tensor, layer: AllocatedLayer, *, rotation: bool, per_head: bool
) -> Found:
    """Codes, zeros and scales, and values read back.

    The latter are rotated by a float64 matrix instead of butterflies, rows one at a time.
    """
    blocks, heads, size, dim = x.shape
    matrix = rotate(torch.eye(dim).double()).T if rotation else torch.eye(dim).double()
    codes, out = torch.zeros(x.shape, dtype=torch.uint8), torch.zeros(x.shape)
    ranges = torch.zeros((2, blocks, heads, size) if per_head else (2, blocks, size), dtype=x.dtype)
    for block, token in np.ndindex(blocks, size):
        rows = [x[block, head, token] for head in range(heads)]
        if rotation:
            rows = [rotate(row.float()).to(x.dtype) for row in rows]
        units = [FP32(float(unit)) for unit in layer.value_scale]
        rows = [row.float() * float(FP32(1) / u) for row, u in zip(rows, units, strict=True)]
        ends = [(min(row.tolist()), max(row.tolist())) for row in rows]
        for head, row in enumerate(rows):
            mine = ends[head : head + 1] if per_head else ends
            low = FP32(min(end[0] for end in mine)) * FP32(0.5)
            high = FP32(max(end[1] for end in mine)) * FP32(0.5)
            place = (block, head, token) if per_head else (block, token)
            ranges[0][place], ranges[1][place] = float(high + low), float(high - low)
            zero, top = FP32(float(ranges[0][place])), FP32(float(ranges[1][place]))
            with np.errstate(over="ignore"):  # of subnormal scales
                inverse = FP32(1) / top if top else FP32(0)
            levels = levels_of(layer.value_levels, float(layer.value_widths[head]))
            found = [
                code_of(float((FP32(value) - zero) * inverse), levels) for value in row.tolist()
            ]
            codes[block, head, token] = torch.tensor(found, dtype=torch.uint8)
            read = torch.tensor(
                [float((FP32(levels[code]) * top + zero) * units[head]) for code in found],
                dtype=torch.float64,
            )
            out[block, head, token] = (matrix.T @ read).float()
    return codes, ranges, out


SHAPES = {
    "heads": st.integers(1, 3),
    "dim": st.sampled_from(DIMS),
    "kind": st.sampled_from(KINDS),
    "coarse": st.booleans(),
    "seed": st.integers(0, 10**6),
}


def drawn(
    heads: int, dim: int, kind: torch.dtype, coarse: bool, seed: int
) -> tuple[AllocatedLayer, torch.Tensor]:
    make: Any = coarse_layer if coarse else random_allocated
    size = max(2, 128 // dim)
    return make(heads, dim, seed=seed), data((2, heads, size, dim), seed, kind)


@settings(max_examples=15, deadline=None)
@given(**SHAPES, outliers=st.sampled_from([0.0, 0.01]))
def test_keys_are_those_of_the_loops(outliers: float, **shape: Any) -> None:
    layer, x = drawn(**shape)
    # Some channels were constant in calibration: 0 in coarse data, which often is 0.
    scale = layer.key_scale.clone()
    scale[:, ::7] = 0.0
    scale[:, 3] = -0.0
    x[:, :, ::2, ::7] = layer.key_zero[:, None, ::7].to(x.dtype)
    zero = layer.key_zero.to(x.dtype).float()
    layer = replace(layer, key_zero=zero, key_scale=scale)
    codes, mask, out = keys_by_loops(x, layer, outliers)
    quantizer = made(layer, outliers)
    packed, slab = quantizer.pack_keys(x)
    rows, size = layer.key_rows(), x.shape[2]
    assert packed.shape == (2, size * rows.token_bytes)
    found = rows.from_tiles(rows.unpack(packed, size))
    # Of a constant, any code will do.
    constant = (layer.key_scale == 0)[:, None] & (x.float() == layer.key_zero[:, None])
    assert constant.any() and torch.equal(found[~constant], codes[~constant])
    assert torch.equal(quantizer.fake_keys(x), out)
    assert torch.equal(quantizer.unpack_keys(packed, slab, size), out)
    if outliers == 0:
        assert slab is None
        return
    assert slab is not None
    index, value = slab.coordinates()
    assert torch.equal(index, mask.view(-1).nonzero().view(-1)) and len(index)
    assert torch.equal(value, x[mask])
    assert torch.equal(slab.count.int(), mask.sum((2, 3), dtype=torch.int32))


@settings(max_examples=15, deadline=None)
@given(**SHAPES, rotation=st.booleans(), per_head=st.booleans())
def test_values_are_those_of_the_loops(rotation: bool, per_head: bool, **shape: Any) -> None:
    layer, x = drawn(**shape)
    codes, ranges, out = values_by_loops(x, layer, rotation=rotation, per_head=per_head)
    quantizer = made(layer, rotation=rotation, per_head=per_head)
    packed, zero, scale = quantizer.pack_values(x)
    rows, size = layer.value_rows(), x.shape[2]
    assert scale.dtype is x.dtype and torch.equal(torch.stack([zero, scale]), ranges)
    assert packed.shape == (2, size * rows.token_bytes)
    assert torch.equal(rows.from_tiles(rows.unpack(packed, size)), codes)
    read = quantizer.unpack_values(packed, zero, scale, size)
    assert torch.equal(read, quantizer.fake_values(x))
    most = 2e-6 * float((scale.float() + zero.float().abs()).max()) if rotation else 0.0
    torch.testing.assert_close(read, out, atol=most, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    dim=st.sampled_from(DIMS),
    size=st.sampled_from([32, 64]),
    kind=st.sampled_from(KINDS),
    outliers=st.sampled_from([0.0, 0.0025]),
    rotation=st.booleans(),
    value_range=st.sampled_from(["token", "token-head"]),
    seed=st.integers(0, 10**6),
)
def test_packed_is_fake_bit_for_bit(
    heads: int, dim: int, size: int, kind: torch.dtype, seed: int, **options: Any
) -> None:
    spec = AllocatedScheme(kind="allocated", block_size=size, **options)
    codec = AllocatedCodec(spec, random_allocated(heads, dim, seed=seed))
    keys, values = (
        data((2, heads, size, dim), seed, kind),
        data((2, heads, size, dim), seed + 1, kind),
    )
    assert_fake_is_packed(codec, keys, values)


@settings(max_examples=10, deadline=None)
@given(**SHAPES, rotation=st.booleans(), per_head=st.booleans(), outliers=st.just(0.01))
def test_a_token_does_not_depend_on_its_neighbours(
    rotation: bool, per_head: bool, outliers: float, **shape: Any
) -> None:
    layer, x = drawn(**shape)
    quantizer = made(layer, outliers, rotation=rotation, per_head=per_head)
    for fake in (quantizer.fake_keys, quantizer.fake_values):
        whole = fake(x)
        for block, token in np.ndindex(x.shape[0], x.shape[2]):
            at = slice(block, block + 1), slice(None), slice(token, token + 1)
            assert torch.equal(fake(x[at]), whole[at])
            assert torch.equal(fake(x[at].clone()), whole[at])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [False, True])
def test_rotation_in_the_weights_gives_the_same_codes(
    dim: int, kind: torch.dtype, per_head: bool
) -> None:
    layer = random_allocated(2, dim, seed=dim)
    x = data((3, 2, 8, dim), dim, kind)
    inside, outside = (made(layer, rotation=r, per_head=per_head) for r in (True, False))
    turned = rotate(x.float()).to(kind)
    for mine, theirs in zip(inside.pack_values(x), outside.pack_values(turned), strict=True):
        assert torch.equal(mine, theirs)
    scale = float(turned.float().abs().max())
    back = rotate(outside.fake_values(turned), inverse=True)
    torch.testing.assert_close(inside.fake_values(x), back, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_makes_outlier_channels_cheap(dim: int) -> None:
    layer = replace(coarse_layer(2, dim, 0), value_widths=torch.tensor([3.0, 3.0]))
    x = torch.randn(2, 2, 16, dim, generator=torch.Generator().manual_seed(1))
    x[..., 5] *= 20
    kept = torch.arange(dim) != 5
    errors = []
    for rotation in (True, False):
        found = made(layer, rotation=rotation).fake_values(x.half())
        errors.append(relative_error(found[..., kept], x[..., kept]))
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_tokens_have_scale_0_and_stay_empty(
    rotation: bool, per_head: bool, kind: torch.dtype
) -> None:
    quantizer = made(random_allocated(2, 64), rotation=rotation, per_head=per_head)
    x = data((1, 2, 8, 64), 3, kind)
    x[:, :, 2], x[:, :, 5], x[:, 1, 6] = 0.0, -0.0, 0.0
    scale = quantizer.pack_values(x)[2]
    found = quantizer.fake_values(x)
    by_token = scale.amax(1) if per_head else scale
    assert (by_token[0] == 0).nonzero().view(-1).tolist()[:2] == [2, 5]
    assert not found[:, :, [2, 5]].any() and found.isfinite().all()
    if per_head:
        assert scale[0, 1, 6] == 0 and not found[:, 1, 6].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_numbers_stay_small(kind: torch.dtype) -> None:
    """Of subnormal scales, the reciprocal may be infinite."""
    smallest = 2.0**-24 if kind is torch.float16 else 2.0**-133
    x = (torch.randint(-3, 4, (1, 2, 8, 64), generator=torch.Generator().manual_seed(0))).to(kind)
    x = x * torch.tensor(smallest, dtype=kind)
    assert x.any()
    for rotation in (True, False):
        quantizer = made(random_allocated(2, 64), rotation=rotation)
        found = quantizer.fake_values(x)
        assert found.isfinite().all() and found.abs().max() <= 4 * 8 * smallest
        packed, zero, scale = quantizer.pack_values(x)
        assert torch.equal(quantizer.unpack_values(packed, zero, scale, 8), found)


HUGE = {torch.float16: 65504.0, torch.bfloat16: 3.3e38}


@settings(max_examples=60, deadline=None)
@given(
    dim=st.sampled_from(DIMS),
    kind=st.sampled_from(KINDS),
    per_head=st.booleans(),
    filled=st.sampled_from([1, 2, 3, 8, 16]),
    seed=st.integers(0, 10**6),
)
def test_the_largest_values_are_refused_or_read_back_finite(
    dim: int, kind: torch.dtype, per_head: bool, filled: int, seed: int
) -> None:
    """A rotation lengthens none, but single elements of a token or of what is read may grow."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 2, 1, dim, generator=generator) * 2 - 1
    x[..., :filled] = x[..., :filled].sign()
    x[..., filled:] *= torch.rand(1, generator=generator) * (filled < 4)
    x = (x * HUGE[kind]).to(kind)
    layer = random_allocated(2, dim, seed=seed)
    layer.value_levels[:] = layer.value_levels / layer.value_levels.abs().amax(1, keepdim=True)
    plain = made(layer, rotation=False, per_head=per_head)
    assert plain.fake_values(x).to(kind).isfinite().all()
    quantizer = made(layer, per_head=per_head)
    overflows = not bool(rotate(x.float()).to(kind).isfinite().all())
    assert quantizer.not_finite(x, x).tolist() == [int(overflows)]
    if overflows:
        with pytest.raises(NonFiniteTokens, match="values: NaN or Inf"):
            quantizer.pack_values(x)
        with pytest.raises(NonFiniteTokens, match="values: NaN or Inf"):
            quantizer.fake_values(x)
        return
    packed, zero, scale = quantizer.pack_values(x)
    found = quantizer.unpack_values(packed, zero, scale, 1)
    assert torch.equal(found, quantizer.fake_values(x))
    assert found.to(kind).isfinite().all()


def test_a_rotation_that_leaves_fp16_is_refused() -> None:
    quantizer = made(random_allocated(2, 64))
    x = torch.zeros(1, 2, 4, 64).half()
    x[0, 1, 2, 9] = 65504.0
    assert quantizer.fake_values(x).isfinite().all()
    x[0, 1, 2] = 65504.0
    with pytest.raises(NonFiniteTokens, match="values: NaN or Inf") as error:
        quantizer.pack_values(x)
    assert len(str(error.value).splitlines()) == 1
    assert quantizer.fake_values(x.bfloat16()).isfinite().all()
    keys = quantizer.fake_keys(x)
    assert torch.equal(keys[0, 1, 2], x[0, 1, 2].float())


@pytest.mark.parametrize("kind", KINDS)
def test_without_outliers_keys_are_clipped(kind: torch.dtype) -> None:
    layer = random_allocated(2, 64, scale=(0.25, 0.5))
    x = (data((2, 2, 8, 64), 4, kind) * 4).contiguous()
    clipping, exact = made(layer, 0.0), made(layer, 0.01)
    packed, slab = clipping.pack_keys(x)
    assert slab is None
    found, kept = clipping.fake_keys(x), exact.fake_keys(x)
    zero, scale = layer.key_zero[:, None], layer.key_scale[:, None]
    away = (x.float() - zero) / scale
    outside, inside = away.abs() > 1 + 1e-5, away.abs() < 1 - 1e-5
    assert outside.any() and inside.any()
    assert torch.equal(found[inside], kept[inside])
    assert torch.equal(kept[outside], x.float()[outside])
    rows = layer.key_rows()
    codes = rows.from_tiles(rows.unpack(packed, 8))
    last = rows.from_tiles(rows.unpack(clipping.pack_keys(torch.full_like(x, 3e4))[0], 8))
    assert torch.equal(codes[away > 1 + 1e-5], last[away > 1 + 1e-5])
    assert not codes[away < -1 - 1e-5].any()
    assert torch.all((found - zero).abs() <= scale * (1 + 1e-6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_are_refused(
    bad: float, rotation: bool, outliers: float, kind: torch.dtype
) -> None:
    quantizer = made(random_allocated(2, 16), outliers, rotation=rotation)
    good = data((1, 2, 4, 16), 0, kind)
    x = good.clone()
    x[0, 1, 3, 5] = bad
    for name, calls in (
        ("keys", (quantizer.pack_keys, quantizer.fake_keys)),
        ("values", (quantizer.pack_values, quantizer.fake_values)),
    ):
        for call in calls:
            call(good)
            with pytest.raises(NonFiniteTokens, match=f"{name}: NaN or Inf"):
                call(x)
    assert quantizer.not_finite(good, good).tolist() == [0]
    assert quantizer.not_finite(x, good).tolist() == [1]
    assert quantizer.not_finite(good, x).tolist() == [1]
    assert quantizer.not_finite(good, x).dtype is torch.int32


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_other_dtypes_are_named(kind: torch.dtype) -> None:
    quantizer = made(random_allocated(1, 16))
    x = torch.zeros(1, 1, 4, 16, dtype=kind)
    with pytest.raises(TypeError, match="keys: expected fp16 or bf16"):
        quantizer.pack_keys(x)
    with pytest.raises(TypeError, match="values: expected fp16 or bf16"):
        quantizer.pack_values(x)


def test_room_for_outliers_on_a_gpu() -> None:
    layer = random_allocated(1, 16)
    assert made(layer, 0.0).key_slots(10**6) == 0
    quantizer = made(layer, 0.004)
    assert quantizer.key_slots(10**6) == 1024 + 6000
    assert quantizer.key_slots(500) == 500  # never more than elements
    quantizer.key_room = 2.0
    assert quantizer.key_slots(10**6) == 2 * (1024 + 6000)


@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 80), (2, 128)])
def test_bytes_are_those_of_all_tables(heads: int, dim: int) -> None:
    layer = random_allocated(heads, dim)
    layer.key_widths.view(-1)[0] = 6
    channels, tiles = heads * dim, heads * dim // 16
    expected = 3 * 4 * channels  # zero, scale, and its reciprocal
    expected += 2 * 4 * heads  # the scale of values and its reciprocal
    for widths, rows in (
        (layer.key_widths, layer.key_rows()),
        (layer.value_widths, layer.value_rows()),
    ):
        expected += 4 * 2 * channels + 8 * (tiles + sum(rows.planes))
        expected += sum(4 * 2 ** int(w) for w in widths.unique())
    assert made(layer).nbytes == expected
