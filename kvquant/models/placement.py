"""Finds the device of each layer of a model, which may be spread over several GPUs."""

from __future__ import annotations

from typing import Any

import torch

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
