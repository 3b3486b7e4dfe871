"""The codec of allocated codes: the models it refuses, room for outliers, rotated values, bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.quantization.hadamard import rotate
from kvquant.schemes.allocated import AllocatedCodec, make_codec
from kvquant.schemes.registry import build_codecs
from kvquant.study.schemes import (
    AllocatedScheme,
    Fp8Scheme,
    Int4HadamardScheme,
    KiviScheme,
    NuqScheme,
    TurboQuantScheme,
)
from tests.support.quantizers import (
    assert_fake_is_packed,
    blocks,
    layer_codec,
    random_allocated,
    relative_error,
)


def codec(heads: int = 2, dim: int = 64, **options: Any) -> AllocatedCodec:
    spec = AllocatedScheme(kind="allocated", **{"block_size": 32, **options})
    return AllocatedCodec(spec, random_allocated(heads, dim))


def refused(made: AllocatedCodec, heads: int, dim: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        made.check_model(heads, dim)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("dim", [16, 64, 80, 112, 128, 192, 256])
@pytest.mark.parametrize("rotation", [True, False])
def test_models_that_fit_are_taken(dim: int, rotation: bool) -> None:
    codec(3, dim, rotation=rotation).check_model(3, dim)


@pytest.mark.parametrize("dim", [8, 24, 72, 100, 120])
@pytest.mark.parametrize("rotation", [True, False])
def test_heads_that_do_not_fill_tiles_are_refused(dim: int, rotation: bool) -> None:
    made = codec(rotation=rotation)
    refused(made, 2, dim, f"head_dim: {dim} is not a multiple of 16")


@pytest.mark.parametrize("dim", [144, 176, 208, 240])
def test_heads_without_a_hadamard_matrix_need_a_scheme_without_rotation(dim: int) -> None:
    made = codec(2, dim)
    refused(made, 2, dim, f"head_dim: no Hadamard rotation of {dim} elements")
    codec(2, dim, rotation=False).check_model(2, dim)
    made.expect_rotated_values()  # by another matrix, then
    made.check_model(2, dim)


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (4, 64), (2, 128), (2, 32), (64, 2 * 16)])
def test_models_of_another_shape_are_refused(heads: int, dim: int) -> None:
    message = f"quantizer: made for 2 kv heads of 64, the model has {heads} of {dim}"
    refused(codec(), heads, dim, message)
    refused(codec(rotation=False), heads, dim, message)


@pytest.mark.parametrize("value_range", ["token", "token-head"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_values_that_arrive_rotated_stay_so(value_range: Any, kind: torch.dtype) -> None:
    plain, folded = codec(value_range=value_range), codec(value_range=value_range)
    assert plain.rotates_values and folded.rotates_values
    folded.expect_rotated_values()
    assert not folded.rotates_values and not folded.quantizer.rotation
    keys, values = blocks(0).to(kind), blocks(1).to(kind)
    turned = rotate(values.float()).to(kind)
    mine, theirs = plain.pack(keys, values), folded.pack(keys, turned)
    for name in ("keys", "values", "zero", "scale"):
        assert torch.equal(mine.dense[name], theirs.dense[name])
    shape = (3, 2, 32, 64)
    (k, v), (folded_k, folded_v) = plain.unpack(mine, shape), folded.unpack(theirs, shape)
    assert torch.equal(k, folded_k)
    torch.testing.assert_close(rotate(v), folded_v, atol=1e-4, rtol=1e-4)
    assert relative_error(v, values) == pytest.approx(relative_error(folded_v, turned), rel=0.01)
    assert relative_error(folded_v, values) > 1  # they are not rotated back
    assert_fake_is_packed(folded, keys, turned)
    folded.expect_rotated_values()  # again
    assert torch.equal(folded.unpack(theirs, shape)[1], folded_v)


@pytest.mark.parametrize(
    "spec",
    [
        NuqScheme(kind="nuq", bits=3),
        KiviScheme(kind="kivi", bits=2),
        Fp8Scheme(kind="fp8"),
        TurboQuantScheme(kind="turboquant", bits=3),
        Int4HadamardScheme(kind="int4-hadamard"),
    ],
    ids=lambda spec: spec.kind,
)
def test_other_codecs_take_plain_values_alone(spec: Any) -> None:
    made = layer_codec(spec, 64)
    assert not made.rotates_values
    with pytest.raises(NotImplementedError):
        made.expect_rotated_values()


def test_without_rotation_there_is_none_to_leave_out() -> None:
    made = codec(rotation=False)
    assert not made.rotates_values
    values = blocks(1)
    before = made.fake(values, values)[1]
    made.expect_rotated_values()
    assert torch.equal(made.fake(values, values)[1], before)


def test_wider_room_is_for_caches_made_from_now_on() -> None:
    made = codec(outliers=0.01)
    slots = made.quantizer.key_slots(10**6)
    made.widen(2.0)
    assert made.quantizer.key_slots(10**6) == 2 * slots
    made.widen(1.5)
    assert made.quantizer.key_slots(10**6) == 3 * slots
    assert made.quantizer.key_slots(1000) == 1000
    # a CPU makes room for what there is
    keys = blocks(0)
    narrow, wide = codec(outliers=0.01).pack(keys, keys), made.pack(keys, keys)
    assert torch.equal(narrow.sparse["keys"].values, wide.sparse["keys"].values)
    assert narrow.nbytes == wide.nbytes
    clipping = codec(outliers=0.0)
    clipping.widen(4.0)
    assert clipping.quantizer.key_slots(10**6) == 0
    assert clipping.pack(keys, keys).sparse == {}


@pytest.mark.parametrize(("value_range", "each"), [("token", 1), ("token-head", 2)])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
def test_bytes_are_widths_scales_and_outliers(value_range: Any, each: int, outliers: float) -> None:
    made = codec(value_range=value_range, outliers=outliers)
    layer = random_allocated(2, 64)
    packed = made.pack(blocks(0), blocks(1))
    tokens = 3 * 32
    codes = int(16 * layer.key_widths.sum() + 64 * layer.value_widths.sum())
    assert 8 * sum(packed.dense[name].nbytes for name in ("keys", "values")) == tokens * codes
    for name in ("zero", "scale"):
        assert packed.dense[name].nbytes == 2 * tokens * each
        assert packed.dense[name].dtype is torch.float16
    assert packed.bad is None  # a CPU refuses at once
    found = 0
    if outliers:
        slab = packed.sparse["keys"]
        assert slab.nnz
        found = 4 * slab.nnz + 3 * 2 * (4 + 2)  # value and position; first entry and number
    assert packed.nbytes == tokens * codes // 8 + 4 * tokens * each + found


def test_what_the_cache_reads_of_the_options() -> None:
    made = codec(sinks=5, block_size=128)
    assert (made.sinks, made.block_size, made.residual) == (5, 128, 0)
    assert not made.rotated_keys
    assert made.shared_bytes == made.quantizer.nbytes > 0
    assert made.tables is None  # kernels of the other codebooks cannot read it
    shape = made.cache_shape(64, 2, 8, torch.bfloat16)
    assert (shape.codebook, shape.outliers, shape.range_per_head) == ("allocated", 0.0025, False)
    assert (shape.block_size, shape.sinks, shape.queries_per_kv_head) == (128, 5, 4)
    assert codec(value_range="token-head").cache_shape(64, 2, 2, torch.float16).range_per_head
    built = build_codecs(
        AllocatedScheme(kind="allocated"), 2, [random_allocated(2, 64), random_allocated(2, 32)]
    )
    assert built is not None
    built[0].check_model(2, 64)
    built[1].check_model(2, 32)


@pytest.mark.parametrize(("zero", "scale", "narrow"), [
    (60000.0, 1000.0, True), (-60000.0, 1000.0, True), (65504.0, 0.0, True),
    (60000.0, 1500.0, False), (-60000.0, 1500.0, False), (0.0, 7e4, False),
])  # fmt: skip
def test_ranges_beyond_fp16_are_known(zero: float, scale: float, narrow: bool) -> None:
    layer = random_allocated(2, 64)
    assert make_codec(AllocatedScheme(kind="allocated"), 0, layer).narrow_tables
    layer = replace(layer, key_zero=layer.key_zero.clone(), key_scale=layer.key_scale.clone())
    layer.key_zero[1, 7], layer.key_scale[1, 7] = zero, scale
    assert make_codec(AllocatedScheme(kind="allocated"), 0, layer).narrow_tables is narrow
