"""Centroids of CQ: fitted to the sample's groups by squared gradients, or refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvquant.calibration.cq_build import _shares, build_cq
from kvquant.calibration.statistics import LayerStatistics
from kvquant.errors import UserError
from kvquant.quantization.weighted_kmeans import weighted_kmeans
from kvquant.study.schemes import CqScheme

HEADS, DIM, TOKENS = 2, 8, 600


def statistics(seed: int = 0, tokens: int = TOKENS) -> LayerStatistics:
    """Statistics of correlated keys and values, of which each token was kept."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS * DIM, HEADS * DIM, generator=generator)
    x = torch.randn(2, tokens, HEADS * DIM, generator=generator) @ mix
    slopes = torch.randn(2, tokens, HEADS * DIM, generator=generator)
    found = LayerStatistics.from_first(x[0], 64, 1, HEADS)
    found.add_keys(x[0], slopes[0] ** 2)
    found.key_sample, found.value_sample = x[0].half(), x[1].half()
    found.key_gradient_sample, found.value_gradient_sample = slopes.bfloat16()
    found.sample_sinks = torch.zeros(tokens)
    return found


def scheme(**options: Any) -> CqScheme:
    return CqScheme(kind="cq", **{"bits": 2.0, "channels": 2, **options})


@pytest.mark.parametrize(("channels", "bits"), [(1, 3.0), (2, 2.0), (4, 1.0), (8, 0.5)])
def test_a_centroid_is_the_mean_of_its_tokens_weighted_by_gradients(
    channels: int, bits: float
) -> None:
    """Lloyd's condition holds for the weights of the paper's equation: the group's g'g."""
    layer = statistics()
    (found,), errors = build_cq([layer], scheme(channels=channels, bits=bits), [], HEADS)
    assert found.problem() is None
    assert found.key_centroids.shape == (HEADS, 2 ** int(bits * channels), DIM)
    for name, table in (("key", found.key_centroids), ("value", found.value_centroids)):
        sample, gradients = (
            getattr(layer, f"{name}{part}").float() for part in ("_sample", "_gradient_sample")
        )
        for head in range(HEADS):
            for first in range(0, DIM, channels):
                own = slice(head * DIM + first, head * DIM + first + channels)
                x, weights = sample[:, own], (gradients[:, own] ** 2).sum(1, keepdim=True)
                centers = table[head, :, first : first + channels]
                nearest = torch.cdist(x, centers).argmin(1)
                far = 0.0
                for code in range(len(centers)):
                    mine = nearest == code
                    mean = (x * weights)[mine].sum(0) / weights[mine].sum()
                    far += float(weights[mine].sum() * (centers[code] - mean).square().sum())
                loss = float((weights * (x - centers[nearest]) ** 2).sum())
                assert far < 0.01 * loss
    assert 0 < errors["keys"] < 1 and 0 < errors["values"] < 1


def test_more_bits_and_more_channels_at_equal_bits_lose_less() -> None:
    """Coupling pays where channels depend on one another, which is the paper's point."""
    layers = [statistics(tokens=3000)]
    built = [build_cq(layers, scheme(bits=b, channels=2), [], HEADS)[1] for b in (1.0, 2.0, 3.0)]
    coupled = [build_cq(layers, scheme(bits=1.0, channels=c), [], HEADS)[1] for c in (1, 2, 4, 8)]
    for errors in (built, coupled):
        for name in ("keys", "values"):
            found = [error[name] for error in errors]
            assert found == sorted(found, reverse=True)


def test_a_scheme_takes_its_part_of_a_larger_sample() -> None:
    layer = statistics()
    (part,), _ = build_cq([layer], scheme(samples=300), [], HEADS)
    assert layer.key_sample is not None and layer.key_gradient_sample is not None
    points, slopes = (
        t[:300].float().unflatten(1, (-1, 2)).transpose(0, 1)
        for t in (layer.key_sample, layer.key_gradient_sample)
    )
    centers, _ = weighted_kmeans(points, slopes.square().sum(2), 16, 0)
    wanted = centers.unflatten(0, (HEADS, -1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(part.key_centroids, wanted.half().float())


def test_centroids_depend_on_the_layer_alone() -> None:
    layers = [statistics(0), statistics(1)]
    both, _ = build_cq(layers, scheme(), [], HEADS)
    (first,), _ = build_cq(layers[:1], scheme(), [], HEADS)
    assert torch.equal(both[0].key_centroids, first.key_centroids)
    assert not torch.equal(both[0].key_centroids, both[1].key_centroids)


def test_first_tokens_have_centroids_if_they_are_quantized() -> None:
    """A kept one stands for one token, a drawn one for as many as were drawn from."""
    layer = statistics()
    tables = {
        name: torch.cat([torch.full((1, HEADS * DIM), far), getattr(layer, name)]).to(dtype)
        for name, far, dtype in (
            ("key_sample", 200.0, torch.float16),
            ("value_sample", -100.0, torch.float16),
            ("key_gradient_sample", 1.0, torch.bfloat16),
            ("value_gradient_sample", 1.0, torch.bfloat16),
        )
    }
    marks = torch.tensor([1.0] + [0.0] * TOKENS)
    more = replace(layer, sample_sinks=marks, **tables)
    (met,), _ = build_cq([more], scheme(), [], HEADS)
    assert torch.equal(met.key_centroids.amax(1), torch.full((HEADS, DIM), 200.0))
    assert torch.equal(met.value_centroids.amin(1), torch.full((HEADS, DIM), -100.0))
    without, plain = (build_cq([x], scheme(sinks=1), [], HEADS)[0][0] for x in (more, layer))
    assert torch.equal(without.key_centroids, plain.key_centroids)
    assert float(without.key_centroids.abs().max()) < 100
    (one,), _ = build_cq([more], scheme(bits=0.5), [], HEADS)  # one centroid of two is its own
    assert torch.equal(one.key_centroids.amax(1), torch.full((HEADS, DIM), 200.0))


def test_drawn_tokens_stand_for_all_that_they_were_drawn_from() -> None:
    marks = torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    assert _shares(marks, 4, 100, sinks=True).tolist() == [2, 2, 25, 25, 25, 25]
    assert _shares(marks, 2, 100, sinks=True).tolist() == [2, 2, 50, 50, 0, 0]
    assert _shares(marks, 2, 100, sinks=False).tolist() == [0, 0, 50, 50, 0, 0]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"sample_sinks": None}, {}, "samples: 600 whole tokens per layer .* has 0 such tokens"),
        ({"sample_sinks": torch.ones(600)}, {}, "has 0 such tokens.*forcerun calibrate"),
        ({"key_gradient_sample": torch.zeros(600, 16)}, {}, "gradients of the keys of layer 0"),
        ({}, {"bits": 0.5, "channels": 16}, "channels: 16 does not divide the model's head_dim 8"),
        (
            {"counts": torch.ones(16, 64)},
            {"bits": 4.0},
            "bits: 256 centroids per code, but only 64 calibration tokens",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line(
    change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    layer = replace(statistics(), **change)
    with pytest.raises(UserError, match=message) as error:
        build_cq([layer], scheme(**options), [], HEADS)
    assert len(str(error.value).splitlines()) == 1
