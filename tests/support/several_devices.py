"""Models whose layers are spread over two devices, and what caches are asked for there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kvquant.models.layer_kinds import layer_kinds
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.models.prefill_quant import adapter_of
from kvquant.models.rotary import rotary_width
from kvquant.quantization.quantizer_file import QuantizerManifest, save_quantizer
from kvquant.quantization.ranged_tables import ranged_tables
from kvquant.study.schemes import (
    AllocatedScheme,
    Fp16Scheme,
    Fp16StaticScheme,
    KiviScheme,
    KvquantRefScheme,
    NuqScheme,
)
from tests.support.cache_uses import cropped, fed, padded, reordered
from tests.support.caches import ids, ragged, step

SCHEMES: dict[str, Any] = {
    "nuq": NuqScheme(kind="nuq", bits=3, block_size=32),
    "nuq-after-rope": NuqScheme(kind="nuq", bits=3, block_size=32, keys="after-rope"),
    "allocated": AllocatedScheme(kind="allocated", bits=3.4, block_size=64),
    "allocated-unrotated": AllocatedScheme(kind="allocated", bits=3.4, rotation=False),
    "kivi": KiviScheme(kind="kivi", bits=4, group=16, residual=16),
    "fp16": Fp16Scheme(kind="fp16"),
    "fp16-static": Fp16StaticScheme(kind="fp16-static"),
    "kvquant-ref": KvquantRefScheme(kind="kvquant-ref", bits=3),
}


def device_map(name: str, model: Any) -> dict[str, int]:
    """A placement on two GPUs by its name.

    Args:
        name: "halves": as accelerate places by itself. "alternating": each layer on another GPU
            than the one before. "apart": all layers on the GPU that does not have the inputs.
        model: The model.
    """
    layers = len(model.model.layers)
    where: Callable[[int], int] = {
        "halves": lambda i: int(i >= layers // 2),
        "alternating": lambda i: i % 2,
        "apart": lambda i: 1,
    }[name]
    found = {f"model.layers.{i}": where(i) for i in range(layers)}
    norm = int(name == "halves")
    head = 0 if model.config.tie_word_embeddings else norm  # tied weights are on one device
    first = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    return {**first, **found, "model.norm": norm, "lm_head": head}


def spread(model: Any, places: dict[str, int]) -> Any:
    """A copy of a model whose modules are where a device map says."""
    from accelerate import dispatch_model  # type: ignore[import-untyped]

    skipped = model._skip_keys_device_placement
    return dispatch_model(copy.deepcopy(model), places, skip_keys=list(skipped or ()))


def saved_quantizer(folder: Path, model: Any, spec: Any) -> Path | None:
    """The file of a quantizer for a model; None where the scheme needs none."""
    config, full = model.config, layer_kinds(model.model).full
    if not spec.registration.calibrated or not full:
        return None
    heads, dim = config.num_key_value_heads, config.head_dim
    manifest = QuantizerManifest(
        library_version="0", model="tiny", weights_sha256="0", scheme="made",
        spec=spec.model_dump(mode="json"), calibration={}, spec_digest="0",
        num_layers=len(full), num_kv_heads=heads, head_dim=dim, calibration_error={},
    )  # fmt: skip
    path = folder / "quantizer.json"
    ranges = [key_range(model, layer) for layer in full]
    layers = [
        ranged_tables(spec, torch.zeros(heads, dim), torch.full((heads, dim), found))
        for found in ranges
    ]
    save_quantizer(path, manifest, layers)
    return path


@torch.no_grad()
def key_range(model: Any, layer: int) -> float:
    """The range of a layer's keys, outside of which one in a thousand is."""
    attention, found = model.model.layers[layer].self_attn, []
    part = adapter_of(attention).part(attention, "keys")
    handle = part.module.register_forward_hook(lambda *args: found.append(args[-1]))
    model(input_ids=ids(2, 90).to(model.get_input_embeddings().weight.device))
    handle.remove()
    width = rotary_width(model, layer_kinds(model.model).full_rope)
    keys = part.read(found[0], width).float().abs().flatten()
    return float(keys.quantile(0.999))


class OnItsDevice:
    """Calls a model with inputs on its device, and gives logits on the CPU.

    Args:
        qm: The model.
    """

    def __init__(self, qm: QuantizedModel) -> None:
        self._qm = qm

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self._qm.device

    def __call__(self, **given: Any) -> Any:
        """Calls the model."""
        moved = {
            name: x.to(self.device) if isinstance(x, torch.Tensor) else x
            for name, x in given.items()
        }
        return SimpleNamespace(logits=self._qm.model(**moved).logits.float().cpu())


def in_parts(
    model: Any, cache: Any, tokens: torch.Tensor, mask: torch.Tensor, parts: Sequence[slice]
) -> torch.Tensor:
    """The logits of the tokens alone, of a batch that is fed in parts."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for part in parts:
        with torch.inference_mode():
            out = model(
                input_ids=tokens[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
        found.append(out.logits)
    return torch.cat(found, 1)[mask.bool()]


def padded_right(model: Any, cache: Any) -> torch.Tensor:
    """A ragged batch, padded on the right, in two chunks of several tokens; its tokens alone."""
    _, tokens, mask = ragged([90, 47, 71], "right")
    return in_parts(model, cache, tokens, mask, (slice(0, 60), slice(60, 90)))


def with_holes(model: Any, cache: Any) -> torch.Tensor:
    """A batch with padding among the tokens of a sequence; its tokens alone."""
    tokens, mask = ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[1, [3, 20, 21, 70]] = 0
    return in_parts(model, cache, tokens, mask, (slice(0, 50), slice(50, 89), slice(89, 90)))


def jumping(model: Any, cache: Any) -> torch.Tensor:
    """Chunks and steps whose positions jump, so that the rotation of each token is kept."""
    tokens, found, at = ids(2, 98), [], 0
    for size, begin in ((50, 0), (45, 100), *((1, 200 + i) for i in range(3))):
        positions = torch.arange(begin, begin + size)[None].expand(2, -1)
        with torch.inference_mode():
            out = model(
                input_ids=tokens[:, at : at + size], position_ids=positions, past_key_values=cache
            )
        found.append(out.logits)
        at += size
    return torch.cat(found, 1)


def shifted(model: Any, cache: Any) -> torch.Tensor:
    """A left-padded batch by transformers' default positions, which count padding."""
    _, tokens, mask = ragged([67, 47], "left")
    found = [step(model, cache, tokens[:, :63], mask[:, :63])]
    found += [step(model, cache, tokens[:, i : i + 1], mask[:, : i + 1]) for i in range(63, 67)]
    return torch.cat(found, 1)[mask.bool()]


def chosen(model: Any, cache: Any) -> torch.Tensor:
    """More tokens over some of the sequences, as when answers have ended."""
    step(model, cache, ids(3, 60))
    cache.batch_select_indices(torch.tensor([2, 0], device=model.device))
    cache.batch_repeat_interleave(2)
    return torch.cat([step(model, cache, ids(4, 20, 1)), step(model, cache, ids(4, 1, 2))], 1)


def copied(model: Any, cache: Any) -> torch.Tensor:
    """Two continuations of one prompt."""
    step(model, cache, ids(2, 60))
    other = copy.deepcopy(cache)
    both = [step(model, each, ids(2, 40, seed)) for seed, each in ((1, cache), (2, other))]
    return torch.cat(both, 1)


USES: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "chunks and steps": fed,
    "left padding": padded("left"),
    "right padding": padded_right,
    "holes": with_holes,
    "jumping positions": jumping,
    "shifted positions": shifted,
    "crop": cropped,
    "a reordered batch": reordered,
    "a chosen batch": chosen,
    "copies": copied,
}
# What a cache cannot do on any number of devices.
IMPOSSIBLE = {
    ("kvquant-ref", "crop"), ("kvquant-ref", "jumping positions"),
    ("fp16", "jumping positions"), ("fp16-static", "jumping positions"),
}  # fmt: skip


def on_gpus(model: Any, scheme: str, folder: Path, *places: dict[str, int]) -> list[QuantizedModel]:
    """Copies of a model with the caches of a scheme, by the library's front door.

    Args:
        model: The model, on the CPU.
        scheme: Which of `SCHEMES`.
        folder: Where the one quantizer of all copies is saved.
        places: The device map of each copy.
    """
    spec = SCHEMES[scheme]
    path = saved_quantizer(folder, model, spec)
    return [load_quantized_model(spread(model, where), spec, quantizer=path) for where in places]


def on_one_and_two(
    model: Any, scheme: str, folder: Path, placement: str = "halves"
) -> list[QuantizedModel]:
    """A model on one GPU, and spread over two; see :func:`device_map` for the placement."""
    return on_gpus(model, scheme, folder, {"": 0}, device_map(placement, model))
