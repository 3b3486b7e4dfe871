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
from kvquant.calibration.key_histograms import ROPED
from kvquant.calibration.statistics import LayerStatistics, load_statistics, save_statistics
from kvquant.calibration.token_sample import MARKS, SAMPLES, TokenSample
from kvquant.errors import UserError
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import NuqScheme
from tests.support.models import tiny_model
from tests.support.studies import study_of

SPEC = CalibrationSpec(windows=2, window=40, sinks=2, seed=3)
TABLES = (*SAMPLES, MARKS)


def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 97, (40,), generator=generator).tolist() for _ in range(2)]


def filled(lengths: list[int], sinks: int, count: int, seed: int) -> dict[str, torch.Tensor]:
    """The tables of tokens that are `[window, position]`."""
    sample = TokenSample(lengths, sinks, count, seed)
    for window, length in enumerate(lengths):
        rows = torch.stack([torch.full((length,), float(window)), torch.arange(length) * 1.0], 1)
        for name in SAMPLES:
            sample.add(window, 0, name, rows)
    return sample.of_layer(0)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    sinks=st.integers(0, 3),
    count=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_tokens_are_drawn_without_replacement_beside_first_ones(
    lengths: list[int], sinks: int, count: int, seed: int
) -> None:
    tables = filled(lengths, sinks, count, seed)
    marks = tables[MARKS]
    for name, dtype in SAMPLES.items():
        assert tables[name].dtype is dtype
        assert torch.equal(tables[name].float(), tables["key_sample"].float())
    tokens = {(w, t) for w, length in enumerate(lengths) for t in range(length)}
    first = {token for token in tokens if token[1] < sinks}
    drawn, kept = (
        [tuple(row) for row in tables["key_sample"][rows].tolist()]
        for rows in (marks == 0, marks > 0)
    )
    assert len(set(drawn)) == len(drawn) == min(count, len(tokens - first))
    assert set(drawn) <= tokens - first
    assert len(set(kept)) == len(kept) == min(count, len(first)) and set(kept) <= first
    assert float(marks.sum()) == pytest.approx(len(first))  # each stands for as many as it must
    assert torch.equal(marks.sort(descending=True).values, marks)  # drawn ones come last


def test_each_token_is_as_likely_as_any_other_and_as_early() -> None:
    first, kept = Counter[tuple[float, ...]](), Counter[tuple[float, ...]]()
    for seed in range(3000):
        drawn = [tuple(row) for row in filled([3, 1, 2], 0, 2, seed)["value_sample"].tolist()]
        kept.update(drawn)
        first[drawn[0]] += 1
    assert len(kept) == 6
    assert all(abs(kept[token] / 3000 - 1 / 3) < 0.05 for token in kept)
    assert all(abs(first[token] / 3000 - 1 / 6) < 0.05 for token in kept)


def test_numbers_beyond_fp16_become_its_largest() -> None:
    sample = TokenSample([1], 0, 1, 0)
    for name in SAMPLES:
        sample.add(0, 0, name, torch.tensor([[1e6, -1e6, 1e-12]]))
    tables = sample.of_layer(0)
    assert tables["key_sample"].tolist() == [[65504.0, -65504.0, 0.0]]
    slopes = tables["key_gradient_sample"].float()
    torch.testing.assert_close(slopes, torch.tensor([[1e6, -1e6, 1e-12]]), rtol=0.01, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_samples_are_what_the_statistics_count(family: str) -> None:
    """With all tokens kept, sums over drawn tokens are those of the second moments."""
    found = calibrate(tiny_model(family), windows(), SPEC, samples=1000)
    for layer in found:
        marks = layer.sample_sinks
        assert marks is not None and marks.tolist() == [1.0] * 4 + [0.0] * 76
        for side in ("key", "value"):
            for part, name in (("_sample", "moments"), ("_gradient_sample", "gradient_moments")):
                rows = getattr(layer, f"{side}{part}")[marks == 0].float()
                by_head = rows.view(-1, 2, 16).transpose(0, 1)
                moments = getattr(layer, f"{side}_{name}")
                torch.testing.assert_close(
                    by_head.mT @ by_head,
                    moments,
                    rtol=0.02,
                    atol=0.01 * float(moments.abs().max()),
                )


def test_first_tokens_are_those_that_a_calibration_without_sinks_meets() -> None:
    """Their keys and gradients, too, whose scale is that of the others."""
    model = tiny_model()
    apart = calibrate(model, windows(), SPEC, samples=1000)[1]
    among = calibrate(model, windows(), SPEC.model_copy(update={"sinks": 0}), samples=1000)[1]
    for name in SAMPLES:
        mine, all_of_them = (
            {tuple(row) for row in getattr(layer, name).tolist()} for layer in (apart, among)
        )
        assert mine == all_of_them
    assert among.sample_sinks is not None and not among.sample_sinks.any()


def test_a_sample_changes_nothing_else_and_is_bounded() -> None:
    model = tiny_model()
    plain, sampled, whole, again = (
        calibrate(model, windows(), SPEC, samples=count) for count in (0, 10, 76, 10)
    )
    for mine, theirs in zip(plain, sampled, strict=True):
        for name in LayerStatistics.__dataclass_fields__:
            if name in TABLES:
                assert getattr(mine, name) is None and len(getattr(theirs, name)) == 10 + 4
            elif name in ROPED:
                assert getattr(mine, name) is None and getattr(theirs, name) is None
            else:
                assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert all(torch.equal(getattr(again[1], n), getattr(sampled[1], n)) for n in TABLES)
    assert all(torch.equal(getattr(whole[1], n)[:14], getattr(sampled[1], n)) for n in TABLES)


def test_files_with_and_without_samples(tmp_path: Path) -> None:
    """A file without samples has no key of them; one with samples serves all other schemes."""
    for samples in (0, 20):
        found = calibrate(tiny_model(), windows(), SPEC, samples)
        file = tmp_path / f"{samples}.safetensors"
        save_statistics(file, found, {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16})
        again, info = load_statistics(file)
        assert info.get("samples") == (samples or None)
        for name in TABLES:
            table, saved = getattr(again[0], name), getattr(found[0], name)
            assert (table is None) == (not samples)
            assert table is None or (torch.equal(table, saved) and table.dtype is saved.dtype)
        build_layer(again[0], NuqScheme(kind="nuq", bits=3), SPEC.outlier_fractions, 2)


@pytest.mark.parametrize("name", TABLES)
def test_samples_that_do_not_fit_are_noticed(name: str) -> None:
    found = calibrate(tiny_model(), windows(), SPEC, samples=20)[0]
    assert found.consistent(32)
    for odd in (None, getattr(found, name)[..., :-1], getattr(found, name)[:-1]):
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
