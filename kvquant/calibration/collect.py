"""`kvquant calibrate`: one pass over text for activations and Fisher gradients in bounded memory.

Each window is one forward and one backward pass. Hooks on the keys (before RoPE) and values of
every layer (:mod:`kvquant.calibration.collector`) add the activations and their squared loss
gradients to histograms as soon as a gradient arrives. The layer's tensors are then freed, so that
memory holds one window's graph and the histograms, whatever the number of windows. Of queries, and
of keys after RoPE, only second moments are kept. A study with a scheme that needs whole tokens has
a bounded sample of them kept as well (:mod:`kvquant.calibration.token_sample`), one with a scheme
that quantizes keys after RoPE their histograms (:mod:`kvquant.calibration.key_histograms`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.calibration.collector import Collector, Report
from kvquant.calibration.key_histograms import RopedKeys
from kvquant.calibration.statistics import LayerStatistics, save_statistics
from kvquant.calibration.token_sample import TokenSample
from kvquant.errors import UserError
from kvquant.fetch.model_manifest import study_manifest
from kvquant.models.loading import load_base_model
from kvquant.models.placement import layer_devices
from kvquant.models.tensor_parallel import refuse_shared
from kvquant.models.value_rotation import refuse_rotated
from kvquant.runtime.devices import claim
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.config import load_study
from kvquant.study.digests import VERSIONS, calibration_digest


@dataclass(frozen=True)
class Calibration:
    """The statistics of a model, and what they were collected by.

    Attributes:
        layers: The statistics of every layer that sees all tokens, in order, on the CPU.
        spec: Windows, sinks, bins, outlier fractions and seed.
        num_kv_heads: Number of key/value heads.
    """

    layers: list[LayerStatistics]
    spec: CalibrationSpec
    num_kv_heads: int

    def facts(self) -> dict[str, Any]:
        """Returns what building a quantizer needs beside the statistics, for their JSON file."""
        return {
            "calibration": self.spec.model_dump(mode="json"),
            "num_layers": len(self.layers),
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.layers[0].low.numel() // self.num_kv_heads,
        }


def print_window(number: int, count: int, loss: float) -> None:
    """Prints the loss of a window to stderr, one line each."""
    print(f"calibrate: window {number}/{count}, loss {loss:.3f}", file=sys.stderr, flush=True)


def draw_windows(ids: list[int], spec: CalibrationSpec) -> list[list[int]]:
    """Draws random windows of a tokenized text, without overlap if the text is long enough.

    Raises:
        UserError: The text is shorter than one window.
    """
    if len(ids) < spec.window:
        raise UserError(
            f"calibration.window: {spec.window} tokens, but the text has only {len(ids)}"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    slots = len(ids) // spec.window
    if slots >= spec.windows:
        chosen = torch.randperm(slots, generator=generator)[: spec.windows] * spec.window
    else:
        chosen = torch.randint(len(ids) - spec.window + 1, (spec.windows,), generator=generator)
    return [ids[s : s + spec.window] for s in chosen.tolist()]


def calibrate(
    model: Any,
    windows: list[list[int]],
    spec: CalibrationSpec,
    samples: int = 0,
    *,
    roped_keys: bool = False,
    report: Report = print_window,
) -> list[LayerStatistics]:
    """Collects the statistics of every layer that sees all tokens, in order.

    Layers with a sliding window are left out, because caches keep their tokens in 16 bits.

    Args:
        model: A causal LM with frozen weights, in evaluation mode.
        windows: Token ids of each window.
        spec: Sinks, bins, outlier fractions and seed.
        samples: Number of whole tokens to keep per layer, beside first ones; all if there are
            fewer.
        roped_keys: Whether to keep histograms of keys after RoPE as well.
        report: Called after each window.

    Raises:
        UserError: There is no window, or one has no token after the sinks; no layer sees all
            tokens; or weights are offloaded.
        NonFinite: A window's loss, activations or gradients are NaN or infinite.
    """
    if not windows or min(map(len, windows)) < max(spec.sinks + 1, 2):
        raise UserError(
            f"calibration: needs windows of at least {max(spec.sinks + 1, 2)} tokens, got "
            f"{min(map(len, windows), default=0)}"
        )
    refuse_rotated(model, "calibration")
    refuse_shared(model, "calibration sees all heads at once; load the model without tp_plan")
    layer_devices(model)  # refuses offloaded weights
    lengths = list(map(len, windows))
    sample = TokenSample(lengths, spec.sinks, samples, spec.seed) if samples else None
    roped = RopedKeys(spec.bins, spec.sinks) if roped_keys else None
    collector = Collector(model, spec, sample, roped)
    collector.run(model, windows, model.get_input_embeddings().weight.device, report)
    found = []
    for i, module in enumerate(collector.layers):
        statistics = collector.statistics[i]
        assert statistics is not None
        statistics.output_moments = output_moments(module, collector.heads)
        for kept in (sample, roped):
            for name, table in kept.of_layer(i).items() if kept else ():
                setattr(statistics, name, table)
        found.append(statistics)
    return found


def calibrate_on(
    model: Any,
    ids: list[int],
    spec: CalibrationSpec,
    samples: int = 0,
    *,
    roped_keys: bool = False,
    report: Report = print_window,
) -> Calibration:
    """Calibrates a model on windows of one tokenized text.

    Args:
        model: A causal LM with frozen weights, in evaluation mode.
        ids: Token ids of the text.
        spec: Windows, sinks, bins, outlier fractions and seed.
        samples: As for :func:`calibrate`.
        roped_keys: As for :func:`calibrate`.
        report: As for :func:`calibrate`.

    Raises:
        UserError: The text is shorter than one window, or a window longer than the model's
            positions; otherwise as :func:`calibrate`.
        NonFinite: As :func:`calibrate`.
    """
    limit = int(model.config.max_position_embeddings)
    if spec.window > limit:
        raise UserError(f"calibration.window: {spec.window} exceeds the model's {limit} positions")
    windows = draw_windows(ids, spec)
    layers = calibrate(model, windows, spec, samples, roped_keys=roped_keys, report=report)
    on_cpu = [layer.cpu() for layer in layers]
    return Calibration(on_cpu, spec, int(model.config.num_key_value_heads))


@torch.no_grad()
def output_moments(attention: Any, heads: int) -> torch.Tensor:
    """Returns the second moments of the rows of W_O, by kv head: fp32 `[heads, dim, dim]`.

    The rows are what the module makes of unit vectors, in whatever form it holds its weights.
    """
    weight = attention.o_proj.weight
    kind = weight.dtype if weight.is_floating_point() else torch.float16
    size = attention.config.num_attention_heads * attention.head_dim
    units = torch.eye(size, dtype=kind, device=weight.device)
    rows = attention.o_proj(units).float() - attention.o_proj(units[:1] * 0).float()
    by_head = rows.view(heads, -1, attention.head_dim, rows.shape[1])
    return (by_head @ by_head.mT).sum(1)


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant calibrate`."""
    from kvquant.fetch.text_overlap import calibrated_text
    from kvquant.fetch.texts import load_text

    study = load_study(args.study)
    study.model(args.model)
    spec = study.calibrated_by(args.calibration)
    manifest = study_manifest(args.model_manifest, study, args.model)
    places = claim(args.device, study.model(args.model).gpus, f"models.{args.model}.gpus")
    model, tokenizer = load_base_model(manifest, device_map=places)
    own = study.datasets.get(spec.dataset)
    text = load_text(args.data_manifest, "calibration", spec.dataset, own)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = calibrate_on(
        model,
        ids,
        spec,
        study.sampled_tokens(args.calibration),
        roped_keys=study.keys_after_rope(args.calibration),
    )
    info = {
        "model": args.model,
        "weights_sha256": manifest.weights_sha256,
        "model_identity": manifest.identity,
        "text": calibrated_text(args.data_manifest).model_dump(mode="json"),
        "spec_digest": calibration_digest(study, args.model, args.calibration),
        "version": VERSIONS["calibrate"],
        **found.facts(),
    }
    save_statistics(args.out, found.layers, info)
    print(f"calibrate: {len(found.layers)} layers, {spec.windows} windows of {spec.window} tokens")
