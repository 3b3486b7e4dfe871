"""Builds the quantizer of Block-GTQ: widths of RoPE pairs by the energies of queries and keys."""

from __future__ import annotations

import numpy as np
import torch

from kvquant.calibration.statistics import LayerStatistics
from kvquant.errors import UserError
from kvquant.formats.block_gtq_layer import BlockGtqLayer
from kvquant.quantization.pair_widths import allocate_pairs, expected_error
from kvquant.study.schemes import BlockGtqScheme


def _pairs(moments: torch.Tensor) -> np.ndarray:
    """Returns the sum of squares of each RoPE pair, `[heads, head_dim / 2]`."""
    squares = moments.double().diagonal(dim1=1, dim2=2)
    return np.asarray(squares.unflatten(1, (2, -1)).sum(1).cpu().numpy())


def pair_energies(statistics: LayerStatistics) -> np.ndarray:
    """Returns the energy of each RoPE pair: half of that of queries and half of that of keys.

    It is the squared length of the pair's two channels as a mean over tokens, and over the query
    heads that read a kv head. RoPE does not change it (but by a factor of its own, if it has one,
    which leaves the widths as they are).

    Raises:
        UserError: The statistics are of an older version.
    """
    queries, keys = statistics.roped_query_moments, statistics.roped_key_moments
    if queries is None or keys is None:
        raise UserError(
            "--stats: was collected by an older version, without moments of queries: calibrate "
            "again"
        )
    return (_pairs(queries) + _pairs(keys)) / (2 * max(float(statistics.counts[0].sum()), 1.0))


def build_block_gtq(
    statistics: list[LayerStatistics], spec: BlockGtqScheme, fractions: list[float], heads: int
) -> tuple[list[BlockGtqLayer], dict[str, float]]:
    """Builds the quantizer of all layers, each from its own statistics.

    Args:
        statistics: Histograms and moments of each layer.
        spec: The scheme.
        fractions: Outlier fractions of the calibration, which are not needed.
        heads: Number of kv heads.

    Returns:
        The layers, and the sums of `energy * 4**-bits` of a head's keys and values, as means over
        heads and layers.

    Raises:
        UserError: The statistics are of an older version.
    """
    layers, keys, values = [], [], []
    for layer in statistics:
        energies = pair_energies(layer)
        widths = allocate_pairs(energies, spec.bits, spec.min_width, spec.max_width)
        layers.append(BlockGtqLayer(torch.from_numpy(widths.astype(np.float32))))
        keys.append(expected_error(energies, widths))
        assert layer.value_moments is not None
        of_values = _pairs(layer.value_moments) / max(float(layer.counts[0].sum()), 1.0)
        values.append(expected_error(of_values, np.full_like(widths, spec.width_of_values)))
    return layers, {"keys": float(np.mean(keys)), "values": float(np.mean(values))}
