"""Moments are those of what attention gets and of W_O; transforms are built from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvquant.calibration.collect import calibrate, output_moments
from kvquant.calibration.wush_build import build_wush
from kvquant.errors import UserError
from kvquant.quantization.wush_transform import wush_transform
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import WushKvScheme
from tests.support.attended import attended
from tests.support.models import tiny_model

SCHEME = WushKvScheme(kind="wush-kv", bits=3)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_moments_are_those_of_what_attention_gets(family: str) -> None:
    """After norms and RoPE, with a mean over the query heads of a kv head, in every window."""
    model = tiny_model(family)
    windows = [torch.randint(0, 97, (40,)).tolist() for _ in range(2)]
    found = calibrate(model, windows, CalibrationSpec(windows=2, window=40, sinks=2))
    for statistics, (queries, keys) in zip(found, attended(model, windows, 2), strict=True):
        assert statistics.roped_key_moments is not None
        assert statistics.roped_query_moments is not None
        for head in range(2):
            wanted = keys[head].mT @ keys[head]
            torch.testing.assert_close(
                statistics.roped_key_moments[head], wanted, rtol=1e-4, atol=1e-4
            )
            group = queries[2 * head : 2 * head + 2].flatten(0, 1)
            torch.testing.assert_close(
                statistics.roped_query_moments[head], group.mT @ group / 2, rtol=1e-4, atol=1e-4
            )


def test_output_moments_are_those_of_the_weights_whatever_the_bias() -> None:
    for bias in (False, True):
        attention = tiny_model(attention_bias=bias).model.layers[1].self_attn
        assert (attention.o_proj.bias is not None) == bias
        found = output_moments(attention, 2)
        weight = attention.o_proj.weight  # [hidden, query heads * head_dim]
        for head in range(2):
            wanted = torch.zeros(16, 16)
            for query in (2 * head, 2 * head + 1):
                block = weight[:, 16 * query : 16 * query + 16]
                wanted += block.mT @ block
            torch.testing.assert_close(found[head], wanted, rtol=1e-4, atol=1e-5)


def test_transforms_are_those_of_their_moments() -> None:
    model = tiny_model("qwen3")
    found = calibrate(model, [torch.randint(0, 97, (64,)).tolist()], CalibrationSpec(window=64))
    layers, errors = build_wush(found, SCHEME, [], 2)
    assert [layer.problem() for layer in layers] == [None, None]
    for statistics, layer in zip(found, layers, strict=True):
        for table, m, h in (
            (layer.key_transform, statistics.roped_key_moments, statistics.roped_query_moments),
            (layer.value_transform, statistics.value_moments, statistics.output_moments),
        ):
            assert m is not None and h is not None
            wanted = wush_transform(m[1].double(), h[1].double(), 0.01)
            torch.testing.assert_close(table[1].double(), wanted, rtol=1e-5, atol=1e-6)
    assert 0 < errors["keys"] < 1 and 0 < errors["values"] < 1


def test_statistics_of_older_versions_are_refused() -> None:
    found = calibrate(tiny_model(), [list(range(50))], CalibrationSpec(window=50))
    older = replace(found[0], output_moments=None)
    with pytest.raises(UserError, match="older version, without moments of queries"):
        build_wush([older], SCHEME, [], 2)
