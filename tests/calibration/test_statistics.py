"""Second moments and rotated values of calibration, and files of older versions without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.calibration.allocated_build import build_allocated
from kvquant.calibration.build import build_layer
from kvquant.calibration.key_histograms import ROPED
from kvquant.calibration.statistics import (
    ADDED,
    VALUE_BINS,
    VALUE_RANGES,
    LayerStatistics,
    head_moments,
    load_statistics,
    save_statistics,
)
from kvquant.calibration.token_sample import SAMPLES
from kvquant.errors import UserError
from kvquant.quantization.hadamard import rotate
from kvquant.study.schemes import AllocatedScheme, NuqScheme

HEADS, DIM, FRACTIONS = 2, 16, [0.0, 0.01]


def statistics(seed: int = 0, tokens: int = 300) -> LayerStatistics:
    """The statistics of two windows of random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randn(2, 4, tokens, HEADS * DIM, generator=generator)
    found = LayerStatistics.from_first(windows[0, 0], 256, len(FRACTIONS), HEADS)
    for keys, key_slopes, values, value_slopes in windows:
        found.add_keys(keys, key_slopes**2)
        found.add_moments(keys, key_slopes, keys=True)
        found.add_values(values, value_slopes**2, FRACTIONS)
        found.add_moments(values, value_slopes, keys=False)
        found.add_rotated(values, value_slopes)
    return found


def test_moments_are_sums_of_products_of_two_channels_of_a_head() -> None:
    generator = torch.Generator().manual_seed(1)
    x, slopes = torch.randn(2, 50, HEADS * DIM, generator=generator)
    found = LayerStatistics.from_first(x, 64, 1, HEADS)
    for part in (slice(0, 20), slice(20, 50)):
        found.add_moments(x[part], slopes[part], keys=False)
    assert found.value_moments is not None and found.value_gradient_moments is not None
    for table, rows in ((found.value_moments, x), (found.value_gradient_moments, slopes)):
        for head in range(HEADS):
            one = rows[:, head * DIM : (head + 1) * DIM]
            naive = sum(torch.outer(token, token) for token in one)
            torch.testing.assert_close(table[head], naive, rtol=1e-5, atol=1e-4)
    assert found.key_moments is not None and not found.key_moments.any()


def test_heads_that_read_a_kv_head_count_as_their_mean() -> None:
    """Of 6 query heads, 3 read a kv head."""
    x = torch.randn(3 * HEADS, 20, DIM, generator=torch.Generator().manual_seed(3))
    found = head_moments(x, HEADS)
    for head in range(HEADS):
        naive = torch.zeros(DIM, DIM)
        for query in range(3 * head, 3 * head + 3):
            for token in x[query]:
                naive += torch.outer(token, token) / 3
        torch.testing.assert_close(found[head], naive, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("kind", range(len(VALUE_RANGES)))
def test_rotated_values_are_weighted_by_their_gradients_and_scales(turn: int, kind: int) -> None:
    generator = torch.Generator().manual_seed(2)
    values, slopes = torch.randn(2, 7, HEADS * DIM, generator=generator)
    values[:, DIM : 2 * DIM] *= 3
    found = LayerStatistics.from_first(values, 64, 1, HEADS)
    found.add_rotated(values, slopes)
    expected = torch.zeros(HEADS, VALUE_BINS)
    rms = values.view(7, HEADS, DIM).square().mean((0, 2)).sqrt()
    assert found.value_rms is not None
    torch.testing.assert_close(found.value_rms, rms)
    per_head, scaled = VALUE_RANGES[kind] == "token-head", VALUE_RANGES[kind] == "token"
    units = rms if scaled else torch.ones(HEADS)
    for token in range(7):
        x, g = (t[token].view(HEADS, DIM) for t in (values, slopes))
        if turn:
            x, g = rotate(x), rotate(g)
        x = x.half().float() / units[:, None]
        for head in range(HEADS):
            own = x[head] if per_head else x
            scale, zero = (own.max() - own.min()) / 2, (own.max() + own.min()) / 2
            for channel in range(DIM):
                place = int((float((x[head, channel] - zero) / scale) + 1) * VALUE_BINS / 2)
                weight = float((g[head, channel] * scale * units[head]) ** 2)
                expected[head, min(place, VALUE_BINS - 1)] += weight
    assert found.rotated_fisher_range2 is not None
    table = found.rotated_fisher_range2[turn, kind]
    torch.testing.assert_close(table.sum(1), expected.sum(1), rtol=1e-4, atol=1e-4)
    # 1 / scale is rounded, so that an element at the edge of a bin may fall beside it
    moved = (table.cumsum(1) - expected.cumsum(1)).abs() > 1e-3
    assert moved.float().mean() < 0.01


def test_a_rotation_spreads_a_large_channel() -> None:
    """A single large channel is spread over all of its head; the other head stays empty."""
    found = statistics()
    assert found.value_gradient_moments is not None
    one = LayerStatistics.from_first(torch.zeros(2, HEADS * DIM) + 1, 64, 1, HEADS)
    x = torch.zeros(1, HEADS * DIM)
    x[0, 3], slopes = 2.0, torch.ones(1, HEADS * DIM)
    one.add_rotated(x, slopes)
    assert one.rotated_fisher_range2 is not None
    plain, rotated = one.rotated_fisher_range2[:, 1].sum(-1)
    assert plain[0] == pytest.approx(DIM * 1.0)  # from 0 to 2
    assert rotated[0] == pytest.approx(DIM * 0.25, rel=1e-3)  # spread over 16 channels: +-0.5
    assert plain[1] == rotated[1] == 0


def test_files_keep_all_tables(tmp_path: Path) -> None:
    layers = [statistics(0), statistics(1)]
    for number, layer in enumerate(layers):
        for name, dtype in SAMPLES.items():
            setattr(layer, name, torch.full((5, HEADS * DIM), number + 0.5, dtype=dtype))
        layer.sample_sinks = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
        for name, before in ROPED.items():
            setattr(layer, name, getattr(layer, before) + 1)
    info = {"num_layers": 2, "num_kv_heads": HEADS, "head_dim": DIM}
    save_statistics(tmp_path / "stats.safetensors", layers, info)
    again, _ = load_statistics(tmp_path / "stats.safetensors")
    for name in LayerStatistics.__dataclass_fields__:
        assert torch.equal(getattr(again[1], name), getattr(layers[1], name))


def test_files_of_an_older_version_serve_the_schemes_of_their_time(tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(ADDED)
    older = replace(statistics(), **nothing)
    info = {"num_layers": 1, "num_kv_heads": HEADS, "head_dim": DIM}
    save_statistics(tmp_path / "stats.safetensors", [older], info)
    (again,), _ = load_statistics(tmp_path / "stats.safetensors")
    assert all(getattr(again, name) is None for name in ADDED)
    build_layer(again, NuqScheme(kind="nuq", bits=3), FRACTIONS, HEADS)
    with pytest.raises(UserError, match="older version, without rotated values: calibrate again"):
        build_allocated([again], AllocatedScheme(kind="allocated"), FRACTIONS, HEADS)


@pytest.mark.parametrize("name", ADDED)
def test_tables_that_do_not_fit_are_noticed(name: str) -> None:
    found = statistics()
    assert found.consistent(HEADS * DIM)
    for odd in (None, getattr(found, name)[..., :-1]):
        changed: dict[str, Any] = {name: odd}
        assert not replace(found, **changed).consistent()
