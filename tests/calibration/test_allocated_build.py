"""Widths go where errors cost most, under a budget that counts everything a block stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.calibration.allocated_build import build_allocated, fixed_bits, head_scales
from kvquant.calibration.collect import calibrate
from kvquant.calibration.statistics import LayerStatistics
from kvquant.errors import UserError
from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.mixed_packing import TILE
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import AllocatedScheme
from tests.support.caches import feed, quantized
from tests.support.models import tiny_model

HEADS, DIM = 2, 32
FRACTIONS = [0.0, 0.01]


def test_heads_are_scaled_to_the_smallest_within_limits() -> None:
    found = head_scales(torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 4.0]))
    found = head_scales(torch.tensor([1e-6, 1.0, 10.0]))  # a head of tiny values keeps its own
    torch.testing.assert_close(found, torch.tensor([1.0, 6.4, 64.0]))
    assert float(head_scales(torch.ones(1))) == 1.0


def collected(
    key_slopes: torch.Tensor, value_slopes: torch.Tensor, seed: int = 0, tokens: int = 400
) -> LayerStatistics:
    """Normal keys and values whose gradients have the given sizes per channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, tokens, HEADS * DIM, generator=generator)
    found = LayerStatistics.from_first(x[0], 256, len(FRACTIONS), HEADS)
    keys, values = x[1] * key_slopes, x[3] * value_slopes
    found.add_keys(x[0], keys**2)
    found.add_moments(x[0], keys, keys=True)
    found.add_values(x[2], values**2, FRACTIONS)
    found.add_moments(x[2], values, keys=False)
    found.add_rotated(x[2], values)
    return found


def scheme(**options: Any) -> AllocatedScheme:
    return AllocatedScheme(kind="allocated", **options)


def bits_of(layers: list[AllocatedLayer], spec: AllocatedScheme) -> float:
    """The mean bits per element that the tables ask for, computed from widths one by one."""
    total = 0.0
    for layer in layers:
        total += TILE * float(layer.key_widths.sum()) + DIM * float(layer.value_widths.sum())
        total += fixed_bits(spec, HEADS, DIM)
    return total / (len(layers) * 2 * HEADS * DIM)


def test_sensitive_pairs_share_a_tile_that_gets_more_bits() -> None:
    slopes = torch.ones(HEADS, DIM)
    sensitive = [1, 2, 3, 5, 7, 8, 11, 13]
    for pair in sensitive:
        slopes[1, [pair, pair + DIM // 2]] = 30.0
    layer = build_allocated(
        [collected(slopes.view(-1), torch.ones(HEADS * DIM))], scheme(), FRACTIONS, HEADS
    )[0][0]
    assert sorted(layer.key_pairs[1, :8].int().tolist()) == sensitive
    assert layer.key_widths[1, 0] >= layer.key_widths[1, 1] + 2
    assert layer.key_widths[1, 0] >= layer.key_widths[0].max() + 2


def test_layers_compete_only_for_the_bits_of_the_whole_model() -> None:
    ones = torch.ones(HEADS * DIM)
    layers = [collected(ones, ones), collected(20 * ones, 20 * ones, 1)]
    options = {"bits": 3.6, "min_value_width": 1}
    shared, _ = build_allocated(layers, scheme(**options), FRACTIONS, HEADS)
    apart, _ = build_allocated(layers, scheme(**options, allocation="layer"), FRACTIONS, HEADS)
    assert shared[1].value_widths.min() > shared[0].value_widths.max()
    assert apart[1].value_widths.sum() == apart[0].value_widths.sum()


@given(
    bits=st.floats(1.5, 6.0),
    outliers=st.sampled_from([0.0, 0.0025, 0.02]),
    value_range=st.sampled_from(["token", "token-head"]),
    seed=st.integers(0, 3),
)
@settings(max_examples=15, deadline=None)
def test_the_budget_is_spent_and_never_exceeded(
    bits: float, outliers: float, value_range: str, seed: int
) -> None:
    slopes = 2 ** torch.randn(2, HEADS * DIM, generator=torch.Generator().manual_seed(seed))
    spec = scheme(bits=bits, outliers=outliers, value_range=value_range)
    try:
        layers, _ = build_allocated([collected(*slopes)], spec, FRACTIONS, HEADS)
    except UserError as error:
        assert str(error).startswith(f"bits: {bits} is too little for this model")
        # keys take at least 1 bit, values the mean rounded down
        least = HEADS * DIM * (1 + int(bits)) + fixed_bits(spec, HEADS, DIM)
        assert 2 * HEADS * DIM * bits < least
        return
    found = bits_of(layers, spec)
    assert found <= bits + 1e-6
    most = 6 + fixed_bits(spec, HEADS, DIM) / (2 * HEADS * DIM)
    assert found >= min(bits, most) - 1.0  # a step of the values of a head is 0.25 bits here
    assert layers[0].problem() is None


def test_more_bits_cost_less_error() -> None:
    slopes = 2 ** torch.randn(2, HEADS * DIM, generator=torch.Generator().manual_seed(5))
    layers = [collected(*slopes)]
    errors = [
        sum(build_allocated(layers, scheme(bits=bits), FRACTIONS, HEADS)[1].values())
        for bits in (2.0, 2.5, 3.0, 4.0, 5.0)
    ]
    assert np.all(np.diff(errors) < 0)


def test_what_calibration_cannot_tell_is_refused() -> None:
    ones, none = torch.ones(HEADS * DIM), torch.zeros(HEADS * DIM)
    for name, slopes in (("keys", (none, ones)), ("values", (ones, none))):
        with pytest.raises(UserError, match=f"all gradients of the {name} of layer 0 were 0"):
            build_allocated([collected(*slopes)], scheme(), FRACTIONS, HEADS)
    with pytest.raises(UserError, match="head_dim: 24 is not a multiple of 16"):
        odd = LayerStatistics.from_first(torch.randn(9, 48), 64, 2, 2)
        build_allocated([odd], scheme(), FRACTIONS, 2)


@pytest.mark.parametrize("bits", [2.5, 3.3, 4.3])
def test_a_long_cache_takes_the_bits_that_the_scheme_names(bits: float) -> None:
    """Blocks take what was planned; the rest is the 16-bit window and what outliers really were."""
    model = tiny_model()
    windows = [torch.randint(0, 97, (200,)).tolist() for _ in range(2)]
    found = calibrate(model, windows, CalibrationSpec(windows=2, window=200))
    spec = scheme(bits=bits, block_size=32, sinks=0)
    layers, _ = build_allocated(found, spec, FRACTIONS, 2)
    qm = quantized(model, spec, layers)
    tokens = 480
    ids = torch.randint(1, 97, (2, tokens), generator=torch.Generator().manual_seed(8))
    _, cache = feed(qm, ids, None, [tokens])
    window = 2 * 2 * 2 * 2 * 2 * 16 * 32  # layers, K and V, bytes, sequences, heads, dim, tokens
    tables = sum(codec.shared_bytes for codec in qm.codecs or [])
    stored = cache_nbytes(cache) - window - tables
    assert 8 * stored / cache_elements(cache) == pytest.approx(bits, abs=0.25)
