"""Tables of a calibrated scheme from key ranges alone, for models without calibration statistics.

Benchmarks time models of random weights, for which nothing can be calibrated. Codebooks that
are fitted to data are those of the normal distribution, allocated widths cycle around their mean,
energies of RoPE pairs, or second moments of keys, are those of their ranges, and centroids of
several channels lie on a grid.
"""

from __future__ import annotations

import torch

from kvquant.errors import UserError
from kvquant.formats.allocated_layer import AllocatedLayer, padded_levels
from kvquant.formats.block_gtq_layer import BlockGtqLayer
from kvquant.formats.cq_layer import CqLayer
from kvquant.formats.lane_layout import looked_up, max_fitted
from kvquant.formats.layer_quantizer import LayerQuantizer, LayerTables
from kvquant.formats.mixed_packing import MAX_WIDTH, TILE
from kvquant.formats.wush_layer import WushLayer
from kvquant.quantization.nuq import fit
from kvquant.quantization.pair_widths import allocate_pairs
from kvquant.quantization.wush_transform import wush_transform
from kvquant.study.datatypes import DATATYPES
from kvquant.study.scheme_kinds import CodebookScheme, Scheme
from kvquant.study.schemes import AllocatedScheme, BlockGtqScheme, CqScheme, WushKvScheme


def ranged_tables(scheme: Scheme, zero: torch.Tensor, scale: torch.Tensor) -> LayerTables:
    """Makes the tables of one layer.

    Args:
        scheme: A scheme of a calibrated kind.
        zero: fp32 `[num_kv_heads, head_dim]`, middle of each key channel's range.
        scale: fp32 `[num_kv_heads, head_dim]`, half the width of that range.

    Raises:
        UserError: The kind has no such tables.
    """
    if isinstance(scheme, CodebookScheme):
        fitted = DATATYPES[scheme.datatype].fitted
        levels = fit("nf" if fitted else scheme.datatype, scheme.bits).to(zero.device)
        return LayerQuantizer(zero, scale, levels, levels.clone())
    if isinstance(scheme, AllocatedScheme):
        return _allocated(scheme.bits, zero, scale)
    if isinstance(scheme, BlockGtqScheme):
        energies = (zero**2 + scale**2).double().unflatten(1, (2, -1)).sum(1).cpu().numpy()
        widths = allocate_pairs(energies, scheme.bits, scheme.min_width, scheme.max_width)
        return BlockGtqLayer(torch.from_numpy(widths).float()).to(zero.device)
    if isinstance(scheme, WushKvScheme):
        units = torch.eye(zero.shape[1], dtype=torch.float64)
        moments = ((zero**2 + scale**2).double().cpu()[:, None]) * units
        keys = torch.stack([wush_transform(m, units, scheme.damping).float() for m in moments])
        values = wush_transform(units, units, scheme.damping).float().expand_as(keys)
        return WushLayer(keys, values.contiguous()).to(zero.device)
    if isinstance(scheme, CqScheme):
        return _coupled(scheme, zero, scale)
    raise UserError(f"scheme: kind '{scheme.kind}' has no tables without calibration statistics")


def _coupled(scheme: CqScheme, zero: torch.Tensor, scale: torch.Tensor) -> CqLayer:
    """Returns centroids on a grid: each channel of a group has its part of the code's bits."""
    dim, width, channels = zero.shape[1], int(scheme.table_bits), scheme.channels
    if dim % channels:
        raise UserError(f"channels: {channels} does not divide the head_dim {dim}")
    codes, columns = torch.arange(2**width), []
    for channel in range(channels):
        bits = width // channels + (channel < width % channels)
        levels = fit("nf" if bits > 1 else "uniform", bits) if bits else torch.zeros(1)
        columns.append(levels[codes % 2**bits])
        codes = codes // 2**bits
    grid = torch.stack(columns, 1).repeat(1, dim // channels).to(zero.device)  # [codes, dim]
    keys = zero[:, None] + grid * scale[:, None]
    values = grid * scale.mean()  # of values nothing is known
    return CqLayer(keys.half().float(), values.half().float().expand_as(keys).contiguous())


def _allocated(bits: float, zero: torch.Tensor, scale: torch.Tensor) -> AllocatedLayer:
    heads, dim = zero.shape
    if dim % TILE:
        raise UserError(f"head_dim: {dim} is not a multiple of {TILE}, as tiles of channels need")
    mean = min(max(round(bits), 2), MAX_WIDTH - 1)
    cycle = torch.tensor([mean + 1, mean, mean - 1, mean], dtype=torch.float32)
    tiles = torch.arange(heads * dim // TILE) % len(cycle)

    def levels(*, of_keys: bool) -> torch.Tensor:
        fitted = [w for w in looked_up(of_keys=of_keys) if w <= max_fitted(bits, of_keys=of_keys)]
        widths = range(1, MAX_WIDTH + 1)
        return padded_levels({w: fit("nf" if w in fitted else "uniform", w) for w in widths})

    pairs = torch.stack([torch.arange(dim // 2).roll(head) for head in range(heads)])
    return AllocatedLayer(
        zero.cpu(),
        scale.cpu(),
        pairs.float(),
        cycle[tiles].view(heads, -1),
        levels(of_keys=True),
        torch.ones(heads),
        mean + (torch.arange(heads) % 2).float(),
        levels(of_keys=False),
    ).to(zero.device)
