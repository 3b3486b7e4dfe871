"""Spreads the layers of a model over several GPUs, and finds the device of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from kvquant.errors import UserError


def layer_devices(model: Any) -> list[torch.device]:
    """Returns the device of each decoder layer.

    Args:
        model: The causal language model.

    Raises:
        UserError: Weights are offloaded, or on several devices that are not all GPUs; or a layer is
            on several GPUs.
    """
    every = {p.device for p in model.parameters()}
    if any(device.type != "cuda" for device in every) and len(every) > 1:
        raise UserError(
            f"device_map: the model is on {', '.join(sorted(map(str, every)))}; the quantized "
            "cache needs all of it on GPUs, or on one device (meta: weights that are offloaded)"
        )
    if any(device.type == "meta" for device in every):
        raise UserError("device_map: the model is on meta; load its weights to a device first")
    found = []
    for number, layer in enumerate(model.model.layers):
        devices = sorted({p.device for p in layer.parameters()}, key=str)
        if len(devices) != 1:
            raise UserError(
                f"device_map: layer {number} is on {', '.join(map(str, devices))}; put each layer "
                f"as a whole on one GPU ('model.layers.{number}': 0)"
            )
        found.append(devices[0])
    return found


def even_shares(sizes: Sequence[int], parts: int, first: int = 0, last: int = 0) -> list[int]:
    """Cuts a row of layers into parts, in order, so that the largest part is as small as possible.

    Args:
        sizes: The bytes of each layer.
        parts: Number of parts, at most that of layers; each gets at least one.
        first: Bytes that the first part has beside its layers.
        last: Bytes that the last part has beside its layers.

    Returns:
        The part of each layer.
    """
    sums = [0, *accumulate(sizes)]
    count = len(sizes)

    def load(part: int, begin: int, end: int) -> int:
        beside = (first if part == 0 else 0) + (last if part == parts - 1 else 0)
        return sums[end] - sums[begin] + beside

    # The best largest part of the first `end` layers, and where its last part begins.
    best: list[tuple[int, list[int]]] = [(load(0, 0, end), []) for end in range(count + 1)]
    for part in range(1, parts):
        best = [
            min(
                (max(best[cut][0], load(part, cut, end)), [*best[cut][1], cut])
                for cut in range(part, end)
            )
            if end > part
            else best[end]
            for end in range(count + 1)
        ]
    cuts = best[count][1]
    return [sum(cut <= layer for cut in cuts) for layer in range(count)]


def _nbytes(module: nn.Module) -> int:
    return sum(int(p.nbytes) for p in module.parameters())


def even_map(model: Any, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Returns the device of each part of a model whose layers are spread evenly by bytes.

    The embedding is on the first device, the norm and the head behind the layers on the last. A
    head that is the embedding is where that is. Layers stay in order.

    Args:
        model: A causal LM; its weights may be on the meta device.
        devices: The devices, each once.

    Raises:
        UserError: There are more devices than layers.
    """
    decoder, layers = model.model, model.model.layers
    if len(devices) > len(layers):
        raise UserError(
            f"gpus: {len(devices)} GPUs are asked for, but the model has {len(layers)} layers, "
            "each of which is on one as a whole; ask for fewer"
        )
    first, last = devices[0], devices[-1]
    places, behind = dict[str, torch.device](), False
    sizes = {"first": 0, "last": 0}
    for name, part in decoder.named_children():
        if part is layers:
            behind = True
            continue
        here = behind and _nbytes(part) > 0
        places[f"model.{name}"] = last if here else first
        sizes["last" if here else "first"] += _nbytes(part)
    embedding = model.get_input_embeddings().weight
    for name, part in model.named_children():
        if part is decoder:
            continue
        tied = any(p is embedding for p in part.parameters())
        places[name] = first if tied else last
        sizes["last"] += 0 if tied else _nbytes(part)
    shares = even_shares([_nbytes(x) for x in layers], len(devices), **sizes)
    return places | {f"model.layers.{i}": devices[share] for i, share in enumerate(shares)}


def spread(model: Any, devices: Sequence[torch.device]) -> Any:
    """Moves a model to a device, or its layers evenly to several; returns the model.

    Args:
        model: A causal LM on the CPU or already where :func:`even_map` places it.
        devices: One device, or several GPUs, each once and with its index.

    Raises:
        UserError: There are more GPUs than layers.
    """
    if len(devices) == 1:
        return model.to(devices[0])
    from accelerate import dispatch_model  # type: ignore[import-untyped]

    # A cache is no tensor that may be moved from layer to layer.
    skipped = list(getattr(model, "_skip_keys_device_placement", None) or ())
    places = {name: device.index for name, device in even_map(model, devices).items()}
    return dispatch_model(model, places, skip_keys=skipped)
