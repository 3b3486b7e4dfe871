"""Energies of queries and keys are those of the model's attention, and decide the widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvquant.calibration.block_gtq_build import build_block_gtq, pair_energies
from kvquant.calibration.collect import calibrate
from kvquant.errors import UserError
from kvquant.formats.rope import rotate
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import BlockGtqScheme
from tests.support.attended import attended
from tests.support.models import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_energies_are_those_of_what_attention_gets(family: str, sinks: int) -> None:
    """After RoPE, which keeps them, after norms if there are any, and per query head."""
    model = tiny_model(family)
    windows = [torch.randint(0, 97, (40,)).tolist() for _ in range(2)]
    found = calibrate(model, windows, CalibrationSpec(windows=2, window=40, sinks=sinks))
    for statistics, (queries, keys) in zip(found, attended(model, windows, sinks), strict=True):
        for head in range(2):
            group = queries[2 * head : 2 * head + 2]
            for pair in range(8):
                both = [pair, pair + 8]
                of_queries = group[..., both].square().sum(-1).mean()
                of_keys = keys[head][:, both].square().sum(-1).mean()
                wanted = float(of_queries + of_keys) / 2
                assert pair_energies(statistics)[head, pair] == pytest.approx(wanted, rel=1e-4)


def test_rope_keeps_energies() -> None:
    angle = torch.randn(1, 5, 8)
    angles = torch.cat([angle, angle], -1)
    x = torch.randn(1, 2, 5, 16)
    turned = rotate(x, angles.cos(), angles.sin())
    sums = [y.square().unflatten(-1, (2, 8)).sum(-2) for y in (x, turned)]
    torch.testing.assert_close(*sums)


def test_widths_spend_the_bits_and_follow_the_energies() -> None:
    model = tiny_model("qwen2")
    found = calibrate(model, [torch.randint(0, 97, (64,)).tolist()], CalibrationSpec(window=64))
    assert found[0].roped_query_moments is not None
    found[0].roped_query_moments[1, 5, 5] *= 1e4
    spec = BlockGtqScheme(kind="block-gtq", bits=2.5, value_bits=2)
    layers, errors = build_block_gtq(found, spec, [], 2)
    assert [layer.problem() for layer in layers] == [None, None]
    assert all(layer.key_widths.sum(1).tolist() == [20.0, 20.0] for layer in layers)
    assert layers[0].key_widths[1].argmax() == 5 and layers[0].key_widths[1, 5] >= 5
    more = build_block_gtq(found, spec.model_copy(update={"bits": 4.0}), [], 2)[1]
    assert errors["keys"] > 2 * more["keys"] > 0 and errors["values"] == more["values"] > 0
    uniform = np.full((2, 8), 2.5)
    plain = np.mean([(pair_energies(s) * 4.0**-uniform).sum(1).mean() for s in found])
    assert errors["keys"] < plain


def test_statistics_of_older_versions_are_refused() -> None:
    found = calibrate(tiny_model(), [list(range(50))], CalibrationSpec(window=50))
    older = replace(found[0], roped_query_moments=None)
    with pytest.raises(UserError, match="older version, without moments of queries"):
        build_block_gtq([older], BlockGtqScheme(kind="block-gtq"), [], 2)
