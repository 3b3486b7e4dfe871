"""Thresholds against the arithmetic that they replace, for every 16-bit number.

Also covers: kernels.pytorch_fused.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.kernels.pytorch_fused import channel_inverse, encode, midpoints
from kvquant.kernels.thresholds import from_order, key_table, key_thresholds, largest
from kvquant.quantization.nuq import fit

KINDS = [torch.float16, torch.bfloat16]


@settings(max_examples=20, deadline=None)
@given(
    zero=st.sampled_from([0.0, -0.0, 1e-7, 0.3, -3.7, 100.0, 40000.0, -65504.0]),
    scale=st.sampled_from([0.0, 3e-8, 1e-4, 0.37, 2.9, 1000.0, 65504.0]),
    jitter=st.floats(-1, 1),
    bits=st.sampled_from([2, 3, 4]),
    dtype=st.sampled_from(KINDS),
)
def test_thresholds_give_the_codes_of_all_numbers(
    zero: float, scale: float, jitter: float, bits: int, dtype: torch.dtype
) -> None:
    z = torch.tensor([[zero * (1 + jitter / 8)]])
    s = torch.tensor([[scale * (1 + jitter / 8)]])
    levels = fit("nf", bits)
    inverse = channel_inverse(s)
    t = key_thresholds(z, inverse, midpoints(levels), dtype, outliers=True)[0, 0].float()
    order = torch.arange(-largest(dtype), largest(dtype) + 1, dtype=torch.int32)
    x = torch.cat((from_order(order, dtype), torch.tensor([-0.0], dtype=dtype))).float()
    assert x.isfinite().all() and (x[:-1].diff() > 0).all()
    normalized = (x - z[0]) * inverse[0]
    assert torch.equal((x[:, None] >= t[:-2]).sum(-1), encode(normalized, levels).long())
    assert torch.equal((x <= t[-2]) | (x >= t[-1]), normalized.abs() > 1)


def test_table_puts_neighbours_together() -> None:
    t = torch.arange(2 * 64 * 5, dtype=torch.float16).view(2, 64, 5)
    table = key_table(t).view(2, 8, 2, 4, 4, 2)
    for head, lane, pair, half, edge in [(1, 3, 2, 1, 4), (0, 7, 3, 0, 2), (1, 0, 0, 1, 0)]:
        channel = lane * 8 + 2 * pair + half
        assert table[head, lane, edge // 4, pair, edge % 4, half] == t[head, channel, edge]
