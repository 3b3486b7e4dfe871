"""Tables of the decode kernel against their definition, element by element."""

from __future__ import annotations

import cmath
import ctypes
import struct

import pytest
import torch

from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels.cuda_structs import head_table_struct
from kvquant.kernels.decode_tables import HeadTables, RopeTables
from kvquant.quantization.nuq import fit
from tests.support.rope import rope


def half(x: torch.Tensor) -> float:
    return float(x.half())


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_head_tables(bits: int, dim: int) -> None:
    torch.manual_seed(bits + dim)
    heads, levels = 3, 1 << bits
    tables = LayerQuantizer(
        torch.randn(heads, dim), torch.rand(heads, dim), fit("nf", bits), fit("uniform", bits)
    )
    made = HeadTables.make(tables)
    assert made.value_levels is tables.value_levels
    assert made.heads.shape == (heads, ctypes.sizeof(head_table_struct(bits, dim)) + 4 * dim)
    for h, row in enumerate(made.heads):
        data = row.numpy().tobytes()
        # Scales and zeros by selector word and lane of four, eight channels each.
        at = 0
        for word in range(dim // 64):
            for j in range(2):
                for lane in range(4):
                    first = dim // 16 * lane + 4 * word + dim // 4 * j
                    channels = [first + i + n * dim // 2 for n in range(2) for i in range(4)]
                    for values in (tables.key_scale, tables.key_zero):
                        read = struct.unpack_from("<8e", data, at)
                        assert list(read) == [half(values[h, c]) for c in channels]
                        at += 16
        # Levels of keys, of values: high bytes, then low ones.
        room = max(8, levels)
        for codebook in (tables.key_levels, tables.value_levels):
            high, low = data[at : at + room], data[at + room : at + 2 * room]
            pairs = [bytes((b, a)) for a, b in zip(high, low, strict=True)]
            numbers = [struct.unpack("<e", pair)[0] for pair in pairs]
            assert numbers == [half(x) for x in codebook] + [0.0] * (room - levels)
            at += 2 * room
        middles = struct.unpack_from(f"<{levels}f", data, at)
        ours = tables.value_levels
        assert list(middles[:-1]) == [
            float((ours[i] + ours[i + 1]) * 0.5) for i in range(levels - 1)
        ]
        assert middles[-1] > 1e38
        at += 4 * levels
        last, first_level, furthest, _ = struct.unpack_from("<4f", data, at)
        assert (last, first_level) == (half(ours[-1]), half(ours[0]))
        at += 16
        assert at == ctypes.sizeof(head_table_struct(bits, dim))
        ends = struct.unpack_from(f"<{2 * dim}e", data, at)
        for c in range(dim):
            for side, level in enumerate((tables.key_levels[0], tables.key_levels[-1])):
                exact = half(level) * half(tables.key_scale[h, c]) + half(tables.key_zero[h, c])
                assert ends[2 * c + side] == float(torch.tensor(exact, dtype=torch.float64).half())
        assert furthest == max(abs(e) for e in ends)


def test_rope_tables_add_to_a_position() -> None:
    dim, chunk, sinks = 128, 64, 3
    made = RopeTables.make(lambda p: rope(p, dim, 1.5), chunk, sinks, 5, torch.empty(0))
    places = made.places.double()  # [token, w, j, t, cos/sin, i]
    assert made.phases.shape == (7, dim // 2)
    assert float(made.thetas[-1]) == 1.5 and float(made.phases[0].abs().max()) == 0
    for k, offset, w, j, t, i in [(4, 37, 1, 1, 3, 2), (0, 0, 0, 0, 0, 0), (5, 63, 1, 0, 2, 3)]:
        f = t * 8 + 4 * w + i + 32 * j
        theta = 10000.0 ** (-2 * f / dim)
        angle = (sinks + k * chunk + offset) * theta
        phase = float(made.phases[k + 1, f])
        product = cmath.rect(1.0, phase) * torch.complex(*places[offset, w, j, t, :, i])
        assert abs(complex(product) - cmath.rect(1.0, angle)) < 1e-3
        found = cmath.rect(1.0, phase + offset * float(made.thetas[f]))
        assert abs(found - cmath.rect(1.0, angle)) < 1e-4
