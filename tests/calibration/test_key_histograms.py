"""Histograms of keys after RoPE against loops over what attention gets, and who is served by them.

The reference takes rotated keys and their gradients from the model's own attention: autograd, not
the rotation of gradients, says what they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvquant.calibration.build import build_layer, build_layers
from kvquant.calibration.collect import calibrate
from kvquant.calibration.key_histograms import ROPED, KeyHistograms, empty_histograms
from kvquant.calibration.statistics import LayerStatistics, load_statistics, save_statistics
from kvquant.errors import UserError
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import KvquantRefScheme, NuqScheme
from tests.support.models import tiny_model

LENGTH, HEADS, DIM = 40, 2, 16
SPEC = CalibrationSpec(windows=3, window=LENGTH, sinks=2, bins=64)
AFTER = NuqScheme(kind="nuq", bits=3, keys="after-rope")
BEFORE = NuqScheme(kind="nuq", bits=3)
YARN: dict[str, Any] = {
    "rope_type": "yarn",  # scales cosine and sine, too
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"family": "qwen2"},  # biases
    "qwen3": {"family": "qwen3"},  # norms of keys
    "yarn": {"rope_parameters": YARN},
}


def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 97, (LENGTH,), generator=generator).tolist() for _ in range(3)]


def attended_keys(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys after RoPE and their gradients of each layer, `[tokens, channels]`, by autograd."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen: list[torch.Tensor] = []

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        key.retain_grad()
        seen.append(key)
        return plain(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["watched"] = watched
    model.config._attn_implementation = "watched"
    for window in windows():
        ids = torch.tensor([window])
        embedded = model.model.embed_tokens(ids).requires_grad_()
        (model(inputs_embeds=embedded, labels=ids, use_cache=False).loss * LENGTH).backward()
    model.config._attn_implementation = "sdpa"

    def rows(x: Any) -> torch.Tensor:
        return x.detach()[0, :, SPEC.sinks :].transpose(0, 1).flatten(1)

    found = []
    for layer in range(len(model.model.layers)):
        own = seen[layer :: len(model.model.layers)]
        gradients = torch.cat([rows(key.grad) for key in own])
        found.append((torch.cat([rows(key) for key in own]), gradients))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_histograms_are_those_of_what_attention_gets(name: str) -> None:
    model = tiny_model(**MODELS[name])
    found = calibrate(model, windows(), SPEC, roped_keys=True)
    for layer, (keys, gradient) in zip(found, attended_keys(model), strict=True):
        roped = layer.roped_keys()
        assert roped is not None
        assert torch.equal(roped.counts.sum(1), torch.full((HEADS * DIM,), 3.0 * (LENGTH - 2)))
        torch.testing.assert_close(
            roped.fisher.sum(1), gradient.square().sum(0), rtol=1e-3, atol=1e-9
        )
        for channel in range(HEADS * DIM):
            low, width = float(roped.low[channel]), float(roped.width[channel])
            counts, fisher = np.zeros(SPEC.bins), np.zeros(SPEC.bins)
            for x, g in zip(keys[:, channel].tolist(), gradient[:, channel].tolist(), strict=True):
                place = int((x - low) / width)
                counts[place] += 1
                fisher[place] += g * g
            # rounding moves an element at the edge of a bin into the next one
            moved = np.abs(np.cumsum(counts) - np.cumsum(roped.counts[channel].numpy()))
            assert moved.max() <= 1 and moved.sum() <= 2
            if not moved.any():
                np.testing.assert_allclose(
                    roped.fisher[channel].numpy(), fisher, rtol=2e-3, atol=1e-5 * fisher.max()
                )


def test_they_are_not_those_before_rope() -> None:
    model = tiny_model()
    for layer in calibrate(model, windows(), SPEC, roped_keys=True):
        roped = layer.roped_keys()
        assert roped is not None
        assert not torch.allclose(roped.fisher.sum(1), layer.fisher.sum(1), rtol=0.01)
        pairs = [x.fisher.sum(1).view(HEADS, 2, DIM // 2).sum(1) for x in (layer, roped)]
        torch.testing.assert_close(*pairs, rtol=1e-3, atol=0)  # a rotation keeps a pair's sum


def test_they_change_nothing_else_and_are_there_on_demand_only() -> None:
    model = tiny_model()
    plain, roped = (calibrate(model, windows(), SPEC, roped_keys=asked) for asked in (False, True))
    for mine, theirs in zip(plain, roped, strict=True):
        assert mine.roped_keys() is None
        for name in LayerStatistics.__dataclass_fields__:
            if name in ROPED:
                assert getattr(mine, name) is None
                assert getattr(theirs, name).shape == getattr(theirs, ROPED[name]).shape
            elif getattr(mine, name) is not None:
                assert torch.equal(getattr(mine, name), getattr(theirs, name))


def test_files_with_and_without_them(tmp_path: Path) -> None:
    info = {"num_layers": 2, "num_kv_heads": HEADS, "head_dim": DIM}
    for asked in (False, True):
        found = calibrate(tiny_model(), windows(), SPEC, roped_keys=asked)
        file = tmp_path / f"{asked}.safetensors"
        save_statistics(file, found, info)
        again, read = load_statistics(file)
        assert read.get("roped_keys") == (asked or None)
        for name in ROPED:
            table, saved = getattr(again[1], name), getattr(found[1], name)
            assert (table is None) == (not asked)
            assert table is None or torch.equal(table, saved)


@pytest.mark.parametrize("name", ROPED)
def test_tables_that_do_not_fit_are_noticed(name: str) -> None:
    found = calibrate(tiny_model(), windows(), SPEC, roped_keys=True)[0]
    assert found.consistent(HEADS * DIM)
    table = getattr(found, name)
    for odd in (None, table[..., :-1], table[:-1], table * -1 if name != "roped_low" else None):
        changed: dict[str, Any] = {name: odd}
        assert not replace(found, **changed).consistent()


def test_ranges_and_codebook_are_those_of_rotated_keys() -> None:
    found = calibrate(tiny_model(), windows(), SPEC, roped_keys=True)
    fractions = SPEC.outlier_fractions
    for layer in found:
        roped = layer.roped_keys()
        assert roped is not None
        built, *errors = build_layer(layer, AFTER, fractions, HEADS)
        before, *others = build_layer(layer, BEFORE, fractions, HEADS)
        as_if = replace(layer, **vars(roped))  # the same tables, called those before RoPE
        wanted = build_layer(as_if, BEFORE, fractions, HEADS)[0]
        for name in ("key_zero", "key_scale", "key_levels", "value_levels"):
            assert torch.equal(getattr(built, name), getattr(wanted, name))
        assert torch.equal(built.value_levels, before.value_levels)
        assert not torch.equal(built.key_scale, before.key_scale)
        assert errors[0] != others[0] and errors[1] == others[1]


def test_statistics_without_them_serve_other_schemes_alone() -> None:
    found = calibrate(tiny_model(), windows(), SPEC)
    build_layers(found, BEFORE, SPEC.outlier_fractions, HEADS)
    reference = KvquantRefScheme(kind="kvquant-ref", bits=3)
    build_layers(found, reference, SPEC.outlier_fractions, HEADS)
    with pytest.raises(UserError, match=r"^keys: after-rope needs .*: calibrate again") as error:
        build_layers(found, AFTER, SPEC.outlier_fractions, HEADS)
    assert len(str(error.value).splitlines()) == 1


def test_grids_grow_with_the_data() -> None:
    """As one grid of the whole range has it, after any number of doublings."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(4, 50, 3, generator=generator)
    data *= torch.tensor([1.0, 9.0, 90.0, 1.0])[:, None, None]
    found = empty_histograms(data[0], 64)
    assert isinstance(found, KeyHistograms) and found.histograms_consistent()
    for window in data:
        found.add_keys(window, window.square())
    everything = data.flatten(0, 1)
    assert torch.equal(found.counts.sum(1), torch.full((3,), 200.0))
    torch.testing.assert_close(found.fisher.sum(1), everything.square().sum(0))
    for channel in range(3):
        edges = found.low[channel] + found.width[channel] * torch.arange(65)
        naive = np.histogram(everything[:, channel].numpy(), edges.numpy())[0]
        assert np.abs(np.cumsum(naive) - found.counts[channel].cumsum(0).numpy()).max() <= 1
