"""The bytes of whole models' caches, and the tokens that fit by them."""

from __future__ import annotations

import pytest
import torch

from kvquant.cache.capacity_formula import model_footprint, tokens_that_fit
from kvquant.cache.footprint import cache_nbytes
from kvquant.cache.memory_formula import planned_footprint
from kvquant.models.loading import load_quantized_model
from kvquant.study.schemes import (
    AllocatedScheme,
    Fp16Scheme,
    Int4HadamardScheme,
    KiviScheme,
    NuqScheme,
)
from tests.support.hybrids import WINDOW, tiny_hybrid

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
