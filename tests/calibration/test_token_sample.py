"""Whole tokens kept by calibration: which, from where, in what file, and what stays the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.calibration.build import build_layer
from kvquant.calibration.collect import calibrate
from kvquant.calibration.statistics import LayerStatistics, load_statistics, save_statistics
from kvquant.calibration.token_sample import SAMPLES, TokenSample
from kvquant.errors import UserError
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import NuqScheme
from tests.support.models import tiny_model
from tests.support.studies import study_of

SPEC = CalibrationSpec(windows=2, window=40, sinks=2, seed=3)


def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 97, (40,), generator=generator).tolist() for _ in range(2)]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    count=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_tokens_are_drawn_without_replacement(lengths: list[int], count: int, seed: int) -> None:
    sample = TokenSample(lengths, count, seed)
    known = []
    for window, length in enumerate(lengths):
        rows = torch.stack([torch.full((length,), 100.0 * window), torch.arange(length) * 1.0], 1)
        known += [tuple(row) for row in rows.tolist()]
        for name in SAMPLES:
            sample.add(window, 0, name, rows)
    tables = sample.of_layer(0)
    found = [tuple(row) for row in tables["key_sample"].tolist()]
    assert len(found) == len(set(found)) == sample.size == min(count, sum(lengths))
    assert set(found) <= set(known)
    for name, dtype in SAMPLES.items():
        assert tables[name].dtype is dtype
        assert torch.equal(tables[name].float(), tables["key_sample"].float())


def test_each_token_is_as_likely_as_any_other_and_as_early() -> None:
    first, kept = Counter[int](), Counter[int]()
    for seed in range(3000):
        sample = TokenSample([3, 1, 2], 2, seed)
        rows = torch.arange(6.0).view(6, 1)
        for window, part in enumerate(rows.split([3, 1, 2])):
            for name in SAMPLES:
                sample.add(window, 0, name, part)
        drawn = sample.of_layer(0)["value_sample"].view(-1).int().tolist()
        kept.update(drawn)
        first[drawn[0]] += 1
    assert all(abs(kept[token] / 3000 - 1 / 3) < 0.05 for token in range(6))
    assert all(abs(first[token] / 3000 - 1 / 6) < 0.05 for token in range(6))


def test_numbers_beyond_fp16_become_its_largest() -> None:
    sample = TokenSample([1], 1, 0)
    for name in SAMPLES:
        sample.add(0, 0, name, torch.tensor([[1e6, -1e6, 1e-12]]))
    tables = sample.of_layer(0)
    assert tables["key_sample"].tolist() == [[65504.0, -65504.0, 0.0]]
    assert torch.allclose(
        tables["key_gradient_sample"].float(), torch.tensor([1e6, -1e6, 1e-12]), 0.01
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_samples_are_what_the_statistics_count(family: str) -> None:
    """With all tokens kept, sums over the sample are those of histograms and moments."""
    found = calibrate(tiny_model(family), windows(), SPEC, samples=1000)
    for layer in found:
        for side in ("key", "value"):
            x, g = (
                getattr(layer, f"{side}{part}").float() for part in ("_sample", "_gradient_sample")
            )
            assert x.shape == g.shape == (2 * 38, 32)
            for rows, name in ((x, "moments"), (g, "gradient_moments")):
                by_head = rows.view(-1, 2, 16).transpose(0, 1)
                moments = getattr(layer, f"{side}_{name}")
                scale = float(moments.abs().max())
                torch.testing.assert_close(
                    by_head.mT @ by_head, moments, rtol=0.02, atol=0.01 * scale
                )


def test_a_sample_changes_nothing_else_and_is_bounded() -> None:
    model = tiny_model()
    plain, sampled = (
        calibrate(model, windows(), SPEC),
        calibrate(model, windows(), SPEC, samples=10),
    )
    for mine, theirs in zip(plain, sampled, strict=True):
        for name in LayerStatistics.__dataclass_fields__:
            if name in SAMPLES:
                assert getattr(mine, name) is None and getattr(theirs, name).shape == (10, 32)
            else:
                assert torch.equal(getattr(mine, name), getattr(theirs, name))
    again = calibrate(model, windows(), SPEC, samples=10)
    assert all(torch.equal(getattr(again[1], n), getattr(sampled[1], n)) for n in SAMPLES)
    whole = calibrate(model, windows(), SPEC, samples=76)
    assert all(torch.equal(getattr(whole[1], n)[:10], getattr(sampled[1], n)) for n in SAMPLES)


def test_files_with_and_without_samples(tmp_path: Path) -> None:
    """A file without samples has no key of them; one with samples serves all other schemes."""
    for samples in (0, 20):
        found = calibrate(tiny_model(), windows(), SPEC, samples)
        file = tmp_path / f"{samples}.safetensors"
        save_statistics(file, found, {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16})
        again, info = load_statistics(file)
        assert info.get("samples") == (samples or None)
        for name, dtype in SAMPLES.items():
            table = getattr(again[0], name)
            assert (table is None) == (not samples)
            assert table is None or (table.dtype is dtype and table.shape == (20, 32))
        build_layer(again[0], NuqScheme(kind="nuq", bits=3), SPEC.outlier_fractions, 2)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_that_do_not_fit_are_noticed(name: str) -> None:
    found = calibrate(tiny_model(), windows(), SPEC, samples=20)[0]
    assert found.consistent(32)
    for odd in (None, getattr(found, name)[:, :-1], getattr(found, name)[:-1]):
        changed: dict[str, Any] = {name: odd}
        assert not replace(found, **changed).consistent()


def test_samples_of_another_type_are_refused(tmp_path: Path) -> None:
    found = calibrate(tiny_model(), windows(), SPEC, samples=20)
    assert found[0].key_sample is not None
    found[0].key_sample = found[0].key_sample.float()
    save_statistics(tmp_path / "s.safetensors", found, {"num_layers": 2})
    with pytest.raises(UserError, match=r"key_sample is torch.float32, not float16: calibrate"):
        load_statistics(tmp_path / "s.safetensors")


def test_a_study_asks_for_the_largest_sample_of_its_schemes() -> None:
    plain: dict[str, Any] = {"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3}}
    assert study_of(schemes=plain).sampled_tokens() == 0
    cq = {"a": {"kind": "cq"}, "b": {"kind": "cq", "samples": 9000}}
    assert study_of(schemes={**plain, "a": cq["a"]}).sampled_tokens() == 4096
    assert study_of(schemes={**plain, **cq}).sampled_tokens() == 9000
