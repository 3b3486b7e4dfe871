"""Tables that the CUDA decode kernel copies instead of computing them in every thread block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.rope import Rope
from kvquant.kernels.cuda_structs import head_table_struct


@dataclass(frozen=True)
class RopeTables:
    """Rotary tables of the decode kernel.

    Attributes:
        places: fp16, `chunk * head_dim` numbers: cosines and sines inside a chunk. Those of
            allocated codes are `[chunk, head_dim / 2, 2]`, others in the order of operands.
        phases: fp32 `[1 + chunks, head_dim / 2]`, angles in radians, from -pi to pi, of position 0
            and of the chunks' first positions.
        thetas: fp32 `[head_dim / 2 + 1]`: radians per position, then the factor that the rope
            scaling puts on cosine and sine.
    """

    places: torch.Tensor
    phases: torch.Tensor
    thetas: torch.Tensor

    @classmethod
    def make(
        cls,
        rope: Rope,
        chunk: int,
        sinks: int,
        chunks: int,
        like: torch.Tensor,
        *,
        allocated: bool = False,
    ) -> RopeTables:
        """Makes tables for chunks 0 to `chunks` (one more than full: the tail begins there).

        A factor that the rope scaling puts on cosine and sine stays out of them: the kernel turns
        queries and keys, and multiplies one of the two.
        """
        device = like.device
        firsts = torch.arange(chunks + 1, device=device) * chunk + sinks
        inside = torch.arange(max(chunk, 2), device=device)
        cos, sin = rope(torch.cat((firsts.new_zeros(1), firsts, inside))[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half].float(), sin[0, :, :half].float()
        angles = torch.atan2(sin, cos)
        phases, thetas = angles[: chunks + 2].contiguous(), angles[chunks + 3]
        both = torch.stack((cos, sin), -1)[chunks + 2 :]
        factor = both[0, 0, :1]
        places = (both[:chunk] / factor).half()
        if allocated:
            return cls(places.contiguous(), phases, torch.cat((thetas, factor)))
        # frequency f = t * (dim / 16) + 4 w + i + (dim / 4) j, read as [w, j, t, {cos, sin}, i]
        words = half // 32  # of a thread and row: dim / 64
        split = places.view(chunk, 2, 4, words, 4, 2)  # token, j, t, w, i, cos/sin
        ordered = split.permute(0, 3, 1, 2, 5, 4).contiguous()
        return cls(ordered, phases, torch.cat((thetas, factor)))


def level_bytes(levels: torch.Tensor) -> torch.Tensor:
    """Returns the high bytes of fp16 levels, then the low ones, at least 8 of each; uint8."""
    both = levels.half().view(torch.uint8).view(-1, 2)
    room = both.new_zeros(max(8, len(levels)), 2)
    room[: len(levels)] = both
    return room.flip(-1).T.reshape(-1)


@dataclass(frozen=True)
class HeadTables:
    """The calibration of one layer as the decode kernel reads it.

    Attributes:
        heads: uint8 `[num_kv_heads, bytes]`. A row is a `struct HeadTable`, followed for each
            channel by the two fp16 numbers that its lowest and its highest level stand for.
        value_levels: fp32 `[2**bits]`; `[6, 64]` of allocated codes, whose kernel has its own.
    """

    heads: torch.Tensor
    value_levels: torch.Tensor

    @classmethod
    def make(cls, tables: LayerQuantizer) -> HeadTables:
        """Makes the tables of one layer on the device of its calibration."""
        heads, dim = tables.key_scale.shape
        scale, zero = tables.key_scale.half(), tables.key_zero.half()
        # channel c = t * (dim / 16) + 4 w + i + (dim / 4) j + (dim / 2) n, read as [w, j, t, n, i]
        channels = torch.stack((scale, zero), 1).view(heads, 2, 2, 2, 4, dim // 64, 4)
        channels = channels.permute(0, 5, 3, 4, 1, 2, 6).reshape(heads, -1)

        levels = tables.value_levels
        middles = torch.cat(((levels[:-1] + levels[1:]) * 0.5, levels.new_full((1,), 3e38)))
        # The kernel dequantizes with one rounding; float64 holds product and sum exactly.
        edges = torch.stack((tables.key_levels[0], tables.key_levels[-1])).half().double()
        ends = (edges * scale.double()[..., None] + zero.double()[..., None]).half()
        furthest = ends.float().abs().amax((1, 2))
        value_ends = torch.stack((levels[-1], levels[0])).half().float()
        both_bytes = torch.cat((level_bytes(tables.key_levels), level_bytes(levels)))
        fields = {
            "key_operands": channels.view(torch.uint8),
            "levels": both_bytes.expand(heads, -1),
            "value_midpoints": middles.view(torch.uint8).expand(heads, -1),
            "value_ends": value_ends.view(torch.uint8).expand(heads, -1),
            "largest_key": furthest[:, None].contiguous().view(torch.uint8),
            "padding": furthest.new_zeros(heads, 1).view(torch.uint8),
        }
        struct = head_table_struct(len(levels).bit_length() - 1, dim)
        parts = [fields[name] for name, *_ in struct._fields_]
        sizes = [getattr(struct, name).size for name, *_ in struct._fields_]
        assert [part.shape[1] for part in parts] == sizes
        return cls(torch.cat((*parts, ends.reshape(heads, -1).view(torch.uint8)), 1), levels)
