"""The calibration of allocated codes as the CUDA decode kernel reads it."""

from __future__ import annotations

import torch

from kvquant.formats.allocated_layer import AllocatedLayer, evenly_spaced
from kvquant.formats.lane_layout import CHUNK, LOOKED_UP_KEYS, LOOKED_UP_VALUES
from kvquant.formats.mixed_packing import CHUNK_PLANE_BYTES, PAIRS_PER_TILE, MixedRows
from kvquant.kernels.cuda_structs import allocated_table_struct
from kvquant.kernels.decode_tables import HeadTables, level_bytes

SUBNORMAL = 24  # the lowest bit of a subnormal fp16 number stands for 2**-24
# Widths of which the kernel shifts codes of the tile's last channels to the bit behind the first's
SHIFTED_WIDTHS = (5,)
EVEN_FOUR = 7  # the reading of values of 4 bits whose levels are evenly spaced


def _operands(layer: AllocatedLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what makes keys of what the kernel reads codes as.

    A code that is looked up is read as its level, one of one bit as 1 or -1, and others as
    `1 + code / 2**width`.

    Returns:
        fp16 factors and summands `[num_kv_heads, head_dim]`, and fp16
        `[num_kv_heads, head_dim, 2]`, the keys that the first and the last level stand for.
    """
    heads, dim = layer.key_scale.shape
    factors, summands = torch.empty(heads, dim).half(), torch.empty(heads, dim).half()
    ends = torch.empty(heads, dim, 2, dtype=torch.float64)
    scale, zero = layer.key_scale.double(), layer.key_zero.double()
    pairs = layer.key_pairs.long().view(heads, -1, PAIRS_PER_TILE)
    for head in range(heads):
        for tile, width in enumerate(layer.key_widths[head].int().tolist()):
            both = torch.cat((pairs[head, tile], pairs[head, tile] + dim // 2))
            levels = layer.key_levels[width - 1, : 2**width].double()
            first, last = levels[0], levels[-1]
            if width in LOOKED_UP_KEYS:
                factor, summand = scale[head, both], zero[head, both]
                read = torch.stack((first, last)).half().double()
            elif width == 1:
                factor = scale[head, both] * (first - last) / 2
                summand = zero[head, both] + scale[head, both] * (first + last) / 2
                read = torch.tensor([1.0, -1.0], dtype=torch.float64)
            else:
                factor = scale[head, both] * (last - first) / (2**width - 1) * 2**width
                summand = zero[head, both] + scale[head, both] * first - factor
                read = torch.tensor([1.0, 2.0 - 2.0**-width], dtype=torch.float64)
            factors[head, both], summands[head, both] = factor.half(), summand.half()
            # The kernel rounds once; float64 holds product and sum exactly.
            ends[head, both] = factor.half().double()[:, None] * read
            ends[head, both] += summand.half().double()[:, None]
    return factors, summands, ends.half()


def _value_reading(levels: torch.Tensor, width: int) -> tuple[int, list[float], float]:
    """Returns how a head's values are read, and what makes levels of what is read.

    Args:
        levels: fp32 `[6, 64]`, the layer's codebooks of values.
        width: Bits per code.

    Returns:
        The kernel's number of the reading, the factors of a tile's first and last eight channels,
        and the shift.
    """
    mine = levels[width - 1, : 2**width]
    first, last = float(mine[0]), float(mine[-1])
    step = (last - first) / (2**width - 1)
    if width == 4 and evenly_spaced(mine):
        return EVEN_FOUR, [step * 2.0**SUBNORMAL] * 2, first
    if width in LOOKED_UP_VALUES:
        return width, [1.0, 1.0], 0.0
    later = width if width in SHIFTED_WIDTHS else 0
    return width, [step * 2.0**SUBNORMAL, step * 2.0 ** (SUBNORMAL - later)], first


def _places(rows: MixedRows, size: int) -> tuple[list[int], int, list[int]]:
    """Returns each head's offset in a block, the bytes of a block and of each head's chunks."""
    chunks = [planes * CHUNK_PLANE_BYTES for planes in rows.planes]
    before, offsets = 0, []
    for chunk in chunks:
        offsets.append(before)
        before += size // CHUNK * chunk
    return offsets, before, chunks


def allocated_tables(layer: AllocatedLayer, size: int) -> HeadTables:
    """Makes the tables of one layer on the device of its calibration.

    Args:
        layer: The calibration.
        size: Tokens per block, a multiple of 64.
    """
    device, layer = layer.key_zero.device, layer.to("cpu")
    heads, dim = layer.key_scale.shape
    struct = allocated_table_struct(dim)
    factors, summands, ends = _operands(layer)
    pairs = layer.key_pairs.long()
    narrow = {
        name: torch.cat([level_bytes(table[w - 1, : 2**w]) for w in (2, 3)])
        for name, table in (
            ("key_levels", layer.key_levels),
            ("value_levels", layer.value_levels),
        )
    }
    wide = torch.cat([level_bytes(half) for half in layer.value_levels[3, :16].split(8)])
    keys, values = (_places(rows, size) for rows in (layer.key_rows(), layer.value_rows()))
    # By tile, thread of four, then x and y: the thread's two pairs.
    channels = torch.stack((pairs, pairs + dim // 2), 1).view(heads, 2, -1, 4, 2)
    channels = channels.permute(0, 2, 3, 1, 4).reshape(heads, -1)
    operands = [x.gather(1, channels).view(heads, -1, 4) for x in (factors, summands)]
    rows = []
    for head in range(heads):
        width = int(layer.value_widths[head])
        reading, factor, shift = _value_reading(layer.value_levels, width)
        numbers = {
            "key_operands": torch.cat([x[head] for x in operands], 1),
            **narrow,
            "wide_levels": wide,
            "offset": torch.tensor([keys[0][head], values[0][head]]),
            "block_bytes": torch.tensor([keys[1], values[1]]),
            "chunk_bytes": torch.tensor([keys[2][head], values[2][head]], dtype=torch.int32),
            "value_reading": torch.tensor([reading], dtype=torch.int32),
            "value_factor": torch.tensor(factor) * layer.value_scale[head],
            "value_shift": torch.tensor([shift]),
            "largest_key": ends[head].float().abs().max()[None],
            "value_scale": layer.value_scale[head : head + 1],
            "pairs": pairs[head].short(),
            "places": pairs[head].argsort().short(),
            "key_widths": torch.nn.functional.pad(
                layer.key_widths[head].to(torch.uint8), (0, 16 - dim // 16)
            ),
        }
        parts = [
            numbers[name].contiguous().view(-1).view(torch.uint8) for name, *_ in struct._fields_
        ]
        assert [len(p) for p in parts] == [
            getattr(struct, name).size for name, *_ in struct._fields_
        ]
        rows.append(torch.cat((*parts, ends[head].view(-1).view(torch.uint8))))
    return HeadTables(torch.stack(rows).to(device), layer.value_levels.to(device))
