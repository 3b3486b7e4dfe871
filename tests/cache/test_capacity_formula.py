"""The bytes of whole models' caches, and the tokens that fit by them."""

from __future__ import annotations

import pytest
import torch

from kvquant.cache.capacity_formula import model_footprint, tokens_that_fit
from kvquant.cache.footprint import cache_nbytes, shared_nbytes
from kvquant.cache.memory_formula import planned_footprint
from kvquant.models.loading import load_quantized_model
from kvquant.schemes.packed_blocks import shape_codec
from kvquant.study.schemes import (
    AllocatedScheme,
    Fp16Scheme,
    Int4HadamardScheme,
    KiviScheme,
    NuqScheme,
)
from tests.support.caches import quantized
from tests.support.hybrids import WINDOW, tiny_hybrid
from tests.support.models import tiny_model

KIVI = KiviScheme(kind="kivi", bits=4, group=16, residual=16)
FP16 = Fp16Scheme(kind="fp16")


@pytest.mark.parametrize("scheme", [KIVI, FP16])
@pytest.mark.parametrize("tokens", [10, 200])
def test_a_hybrid_model(scheme: KiviScheme | Fp16Scheme, tokens: int) -> None:
    """One layer sees all tokens, the other its window."""
    qm = load_quantized_model(tiny_hybrid("ministral"), scheme)
    cache = qm.new_cache()
    with torch.inference_mode():
        qm.model(input_ids=torch.ones((2, tokens), dtype=torch.long), past_key_values=cache)
    found = model_footprint(scheme, (1, 2, 16), [[tokens, tokens]], windows=[WINDOW])
    assert found is not None and cache_nbytes(cache) == found.total


def test_allocated_codes_without_tables_take_their_bits() -> None:
    spec = AllocatedScheme(kind="allocated", bits=3.4)
    blocks = planned_footprint(spec, 8, 128, [[1 + 64 * 50]])
    assert 8 * blocks.codes / (2 * 8 * 128 * 64 * 50) == pytest.approx(3.4, abs=1e-6)
    assert blocks.window == 2 * 2 * 8 * 128 * (1 + 64)
    whole = model_footprint(spec, (4, 8, 128), [[1 + 64 * 50]])
    assert whole == blocks.times(4)


def test_allocated_codes_without_tables_are_what_a_model_allocates() -> None:
    """Tables of all sequences included, before the first block is full."""
    spec = AllocatedScheme(kind="allocated", bits=3.4, outliers=0.0)
    qm = quantized(tiny_model(), spec)
    cache = qm.new_cache()
    with torch.inference_mode():
        qm.model(input_ids=torch.ones((1, 60), dtype=torch.long), past_key_values=cache)
    codec = shape_codec(spec, 2, 16)
    assert codec is not None
    found = model_footprint(spec, (2, 2, 16), [[60]], shared=codec.shared_bytes)
    assert found is not None and found.tables == shared_nbytes(cache) > 0.05 * found.total
    assert found.total == cache_nbytes(cache)


def test_a_gpu_has_room_for_more_outliers_than_expected() -> None:
    spec = AllocatedScheme(kind="allocated", bits=3.4, outliers=0.005)
    calls = [[1 + 64 * 3], [64 * 50]]
    room = planned_footprint(spec, 8, 128, calls, key_room=1.5)
    element = 64 * 8 * 128  # of a block's keys
    slots = [1.5 * 0.005 * 3 * element + 1024, 1.5 * 0.005 * 50 * element + 1024]
    assert room.outliers == round(4 * (sum(slots) - 0.005 * 53 * element))
    assert planned_footprint(spec, 8, 128, calls).outliers == 0
    small = planned_footprint(spec, 1, 16, [[1 + 64]], key_room=1.5)
    assert small.outliers == 4 * round((1 - 0.005) * 64 * 16)  # a slot for every element


def test_tokens_that_fit() -> None:
    shape = (2, 1, 64)
    assert tokens_that_fit(FP16, None, shape, 96, 96 * 10 * 2 * 2 * 2 * 64) == 960
    spec = NuqScheme(kind="nuq", bits=3)
    one = model_footprint(spec, shape, [[96]])
    assert one is not None
    assert tokens_that_fit(spec, None, shape, 96, 5 * one.total) == 5 * 96
    assert tokens_that_fit(Int4HadamardScheme(kind="int4-hadamard"), None, shape, 96, 10**9) is None
    wide = model_footprint(spec, shape, [[96]], key_room=1.5)
    assert wide is not None and wide.total > one.total
