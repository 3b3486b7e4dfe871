"""Builds the quantizer of CQ: centroids of the coupled channels of each head.

The paper's Fisher-guided learning (arXiv 2405.03917) minimizes, for each group of coupled channels,
the sum over calibration tokens of the group's squared gradient length times the squared distance to
the nearest centroid, by weighted k-means with a k-means++ start. First tokens of sequences, which
the paper quantizes like all others, are among the tokens unless the scheme keeps them in 16 bits.
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


def _shares(marks: torch.Tensor, count: int, total: int, *, sinks: bool) -> torch.Tensor:
    """Returns how many tokens of the text each token of a sample stands for; 0 leaves it out.

    Args:
        marks: See `sample_sinks` of :class:`LayerStatistics`.
        count: Number of drawn tokens to use.
        total: Number of tokens that they were drawn from.
        sinks: Whether first tokens of sequences are quantized.
    """
    drawn = marks == 0
    used = drawn & (drawn.cumsum(0) <= count)
    return used * (total / count) + marks * sinks


def _centroids(
    sample: torch.Tensor,
    gradients: torch.Tensor,
    shares: torch.Tensor,
    spec: CqScheme,
    heads: int,
    seed: int,
) -> tuple[torch.Tensor, float]:
    """Returns the table of :class:`CqLayer`, and its weighted error over that of a mean alone."""
    points = _groups(sample, spec.channels)
    weights = _groups(gradients, spec.channels).square().sum(2) * shares
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
    total = round(float(statistics[0].counts[0].sum()))
    needed = min(spec.samples, total)
    if needed < 2 ** int(spec.table_bits):
        raise UserError(
            f"bits: {2 ** int(spec.table_bits)} centroids per code, but only {needed} calibration "
            "tokens to fit them to: raise calibration.windows, or choose fewer bits or channels"
        )
    layers, errors = [], torch.zeros(2, dtype=torch.float64)
    for number, layer in enumerate(statistics):
        marks = layer.sample_sinks
        held = 0 if marks is None else int((marks == 0).sum())
        if marks is None or held < needed:
            raise UserError(
                f"samples: {needed} whole tokens per layer are needed, but --stats has {held} such "
                "tokens, as it was made for other schemes: calibrate again with this study "
                "(`snakemake --forcerun calibrate`)"
            )
        shares = _shares(marks, needed, total, sinks=spec.sinks == 0)
        used = shares > 0
        built = []
        for side, name in enumerate(("key", "value")):
            sample, gradients = (
                getattr(layer, f"{name}{part}")[used] for part in ("_sample", "_gradient_sample")
            )
            if not gradients.any():
                raise UserError(
                    f"samples: all gradients of the {name}s of layer {number} were 0 in "
                    "calibration, so that centroids have no weights: calibrate in fp32"
                )
            seed = SEED + (2 * number + side) * 1_000_003
            table, error = _centroids(sample, gradients, shares[used], spec, heads, seed)
            built.append(table)
            errors[side] += error
        layers.append(CqLayer(*built))
    keys, values = (errors / len(layers)).tolist()
    return layers, {"keys": keys, "values": values}
