"""Builds the quantizer of WUSH-KV: a transform per head of keys, and one of values."""

from __future__ import annotations

import torch

from kvquant.calibration.statistics import LayerStatistics
from kvquant.errors import UserError
from kvquant.formats.wush_layer import WushLayer
from kvquant.quantization.wush_transform import wush_transform
from kvquant.study.schemes import WushKvScheme


def _transforms(
    moments: torch.Tensor, hessians: torch.Tensor, damping: float
) -> tuple[torch.Tensor, float]:
    """Returns the transforms of all heads, and the mean loss of an error of unit step in each.

    With levels a fixed part of the mean square apart, the loss is the product of the mean squares
    and of the traces of `T^-T H T^-1`, here relative to those of untransformed vectors.
    """
    found, losses = [], []
    for m, h in zip(moments.double().cpu(), hessians.double().cpu(), strict=True):
        transform = wush_transform(m, h, damping)
        found.append(transform.float())
        undone = torch.linalg.inv(transform)
        after = (transform @ m @ transform.mT).trace() * (undone.mT @ h @ undone).trace()
        before = m.trace() * h.trace()
        losses.append(float(after / before) if float(before) > 0 else 1.0)
    return torch.stack(found), sum(losses) / len(losses)


def build_wush(
    statistics: list[LayerStatistics], spec: WushKvScheme, fractions: list[float], heads: int
) -> tuple[list[WushLayer], dict[str, float]]:
    """Builds the quantizer of all layers, each from its own statistics.

    Args:
        statistics: Moments of each layer.
        spec: The scheme.
        fractions: Outlier fractions of the calibration, which are not needed.
        heads: Number of kv heads.

    Returns:
        The layers, and the losses of keys and values over those without transforms, as means over
        heads and layers.

    Raises:
        UserError: The statistics are of an older version, or heads have no Hadamard matrix.
    """
    layers, keys, values = [], 0.0, 0.0
    for number, layer in enumerate(statistics):
        found = [
            (layer.roped_key_moments, layer.roped_query_moments),
            (layer.value_moments, layer.output_moments),
        ]
        built = []
        for moments, hessians in found:
            if moments is None or hessians is None:
                raise UserError(
                    "--stats: was collected by an older version, without moments of queries: "
                    "calibrate again"
                )
            built.append(_transforms(moments, hessians, spec.damping))
        layers.append(WushLayer(built[0][0], built[1][0]))
        if (problem := layers[-1].problem()) is not None:
            raise UserError(f"damping: {spec.damping} is too little for layer {number}: {problem}")
        keys, values = keys + built[0][1], values + built[1][1]
    return layers, {"keys": keys / len(layers), "values": values / len(layers)}
