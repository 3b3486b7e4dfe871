"""Builds the quantizer of CQ: centroids of the coupled channels of each head.

The paper's Fisher-guided learning (arXiv 2405.03917) minimizes, for each group of coupled channels,
the sum over calibration tokens of the group's squared gradient length times the squared distance to
the nearest centroid, by weighted k-means with a k-means++ start.
"""

from __future__ import annotations

import torch

from kvquant.calibration.statistics import LayerStatistics
from kvquant.errors import UserError
from kvquant.formats.cq_layer import CqLayer
from kvquant.quantization.weighted_kmeans import weighted_kmeans
from kvquant.study.schemes import CqScheme

SEED = 0  # of the k-means++ starts; tokens are drawn with the calibration's seed


def _groups(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Returns `[tokens, all channels]` as fp32 `[groups, tokens, channels]`."""
    return x.float().unflatten(1, (-1, channels)).transpose(0, 1).contiguous()


def _centroids(
    sample: torch.Tensor, gradients: torch.Tensor, spec: CqScheme, heads: int, seed: int
) -> tuple[torch.Tensor, float]:
    """Returns the table of :class:`CqLayer`, and its weighted error over that of a mean alone."""
    points = _groups(sample, spec.channels)
    weights = _groups(gradients, spec.channels).square().sum(2)
    centers, loss = weighted_kmeans(points, weights, 2 ** int(spec.table_bits), seed)
    mean = (points * weights.unsqueeze(2)).sum(1, keepdim=True)
    mean /= weights.sum(1)[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
    before = (weights * (points - mean).square().sum(2)).sum()
    # `[groups, centroids, channels]` of all heads to `[heads, centroids, head_dim]`.
    table = centers.unflatten(0, (heads, -1)).transpose(1, 2).flatten(2)
    return table.half().float().contiguous(), float(loss.sum() / before) if before > 0 else 0.0


def build_cq(
    statistics: list[LayerStatistics], spec: CqScheme, fractions: list[float], heads: int
) -> tuple[list[CqLayer], dict[str, float]]:
    """Builds the quantizer of all layers, each from its own sample of tokens.

    Args:
        statistics: Samples of each layer.
        spec: The scheme.
        fractions: Outlier fractions of the calibration, which are not needed.
        heads: Number of kv heads.

    Returns:
        The layers, and the weighted squared errors of keys and of values over those of one centroid
        per group, as means over layers.

    Raises:
        UserError: The statistics have too few tokens, or the scheme does not fit the model.
    """
    dim = len(statistics[0].low) // heads
    if dim % spec.channels:
        raise UserError(f"channels: {spec.channels} does not divide the model's head_dim {dim}")
    needed = min(spec.samples, round(float(statistics[0].counts[0].sum())))
    if needed < 2 ** int(spec.table_bits):
        raise UserError(
            f"bits: {2 ** int(spec.table_bits)} centroids per code, but only {needed} calibration "
            "tokens to fit them to: raise calibration.windows, or choose fewer bits or channels"
        )
    layers, errors = [], torch.zeros(2, dtype=torch.float64)
    for number, layer in enumerate(statistics):
        built = []
        for side, name in enumerate(("key", "value")):
            sample = getattr(layer, f"{name}_sample")
            gradients = getattr(layer, f"{name}_gradient_sample")
            if sample is None or len(sample) < needed:
                held = "no" if sample is None else f"only {len(sample)}"
                raise UserError(
                    f"samples: {needed} whole tokens per layer are needed, but --stats has {held} "
                    "such tokens, as it was made for other schemes: calibrate again with this "
                    "study (`snakemake --forcerun calibrate`)"
                )
            if not gradients.any():
                raise UserError(
                    f"samples: all gradients of the {name}s of layer {number} were 0 in "
                    "calibration, so that centroids have no weights: calibrate in fp32"
                )
            seed = SEED + (2 * number + side) * 1_000_003
            table, error = _centroids(sample[:needed], gradients[:needed], spec, heads, seed)
            built.append(table)
            errors[side] += error
        layers.append(CqLayer(*built))
    keys, values = (errors / len(layers)).tolist()
    return layers, {"keys": keys, "values": values}
