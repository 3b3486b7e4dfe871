"""Calibration statistics against plain loops, and the quantizer built from them.

Also covers: calibration.build, study.calibration.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvquant.calibration import collector
from kvquant.calibration.build import build_layer, percentile
from kvquant.calibration.collect import calibrate, draw_windows
from kvquant.calibration.statistics import LayerStatistics, load_statistics, save_statistics
from kvquant.errors import UserError
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.quantization.quantizer_file import load_quantizer
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import NuqScheme
from tests.support.models import tiny_model
from tests.support.quantizers import save_made_quantizer


def test_percentiles_of_streamed_data_follow_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(6, 700, 5, generator=generator) * torch.tensor([1, 2, 0.1, 5, 1.0])
    data[3:] *= 4  # later windows leave the first grid
    statistics = LayerStatistics.from_first(data[0], 1024, 1, 1)
    for window in data:
        statistics.add_keys(window, torch.ones_like(window))
    everything = data.reshape(-1, 5)
    assert torch.equal(statistics.counts.sum(1), torch.full((5,), 4200.0))
    for q in (0.005, 0.5, 0.995):
        found = percentile(statistics.counts, statistics.low, statistics.width, q)
        expected = torch.quantile(everything, q, dim=0)
        assert torch.all((found - expected).abs() <= 3 * statistics.width)


def test_fisher_weights_are_squared_gradients_of_the_loss() -> None:
    model = tiny_model()
    windows = [torch.randint(0, 97, (40,)).tolist() for _ in range(2)]
    spec = CalibrationSpec(windows=2, window=40, sinks=1)
    found = calibrate(model, windows, spec)
    # the same by hand, for the values of the last layer
    total = 0.0
    for window in windows:
        ids = torch.tensor([window])
        kept: list[torch.Tensor] = []

        def hook(module: object, args: object, output: torch.Tensor, kept: list = kept) -> None:
            output.retain_grad()
            kept.append(output)

        projection = model.model.layers[1].self_attn.v_proj
        handle = projection.register_forward_hook(hook)
        embedded = model.model.embed_tokens(ids).requires_grad_()
        loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss * 40
        loss.backward()
        gradient = kept[0].grad
        assert gradient is not None
        total += float((gradient[0, 1:] ** 2).sum())
        handle.remove()
    assert float(found[1].value_fisher[0].sum()) == pytest.approx(total, rel=1e-4)
    assert float(found[1].value_counts[0].sum()) == 2 * 39 * 32


@pytest.mark.fault(
    "library",
    "gradients of a long window that are below the range of fp16",
    "the Fisher weights are those of fp32",
)
def test_fisher_weights_in_fp16_are_those_in_fp32() -> None:
    windows = [torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(1)).tolist()]
    spec = CalibrationSpec(windows=1, window=400)

    def weights(dtype: torch.dtype) -> list[torch.Tensor]:
        model = tiny_model()
        model.lm_head.weight.data.mul_(0.1)  # gradients as small as those of a trained model
        found = calibrate(model.to(dtype), windows, spec)
        return [s.fisher.sum(1) for s in found] + [s.value_fisher[0].sum() for s in found]

    for exact, found in zip(weights(torch.float32), weights(torch.float16), strict=True):
        assert ((found / exact).log().abs() < 0.05).all()


def test_the_scale_of_the_loss_changes_no_bit_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    windows = [torch.randint(0, 97, (75,)).tolist() for _ in range(2)]
    spec = CalibrationSpec(windows=2, window=75)
    found = calibrate(model, windows, spec)
    monkeypatch.setattr(collector, "loss_scale", lambda tokens: 1)
    for one, other in zip(found, calibrate(model, windows, spec), strict=True):
        assert torch.equal(one.fisher, other.fisher)
        assert torch.equal(one.value_fisher, other.value_fisher)


def test_statistics_and_quantizer_files_come_back(tmp_path: Path) -> None:
    model = tiny_model()
    spec = CalibrationSpec(windows=1, window=64)
    found = calibrate(model, [torch.randint(0, 97, (64,)).tolist()], spec)
    info = {"num_layers": 2}
    save_statistics(tmp_path / "stats.safetensors", found, info)
    again, _ = load_statistics(tmp_path / "stats.safetensors")
    assert torch.equal(again[1].fisher, found[1].fisher)
    scheme = NuqScheme(kind="nuq", bits=3)
    layers = [build_layer(s, scheme, spec.outlier_fractions, 2)[0] for s in again]
    assert layers[0].key_levels.numel() == 8
    assert torch.all(layers[0].key_levels.diff() > 0)
    path = save_made_quantizer(tmp_path / "quantizer.json", scheme, "a" * 64, layers)
    _, loaded = load_quantizer(path, weights_sha256="a" * 64)
    assert isinstance(loaded[1], LayerQuantizer)
    assert torch.equal(loaded[1].key_scale, layers[1].key_scale)
    with pytest.raises(UserError, match="built for model 'tiny'"):
        load_quantizer(path, weights_sha256="b" * 64)
    path.with_suffix(".safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        load_quantizer(path, weights_sha256=None)


def test_fewer_bits_code_worse() -> None:
    model = tiny_model()
    spec = CalibrationSpec(windows=1, window=64)
    found = calibrate(model, [torch.randint(0, 97, (64,)).tolist()], spec)
    errors = [
        build_layer(found[0], NuqScheme(kind="nuq", bits=b), spec.outlier_fractions, 2)[1]
        for b in (4, 3, 2)
    ]
    assert errors == sorted(errors)


def test_window_longer_than_the_text_is_an_error() -> None:
    with pytest.raises(UserError, match=r"calibration\.window"):
        draw_windows([1, 2, 3], CalibrationSpec(window=32))
