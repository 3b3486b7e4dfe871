"""A call over a packed past by the Triton kernels, compared with attention in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.layout import Layout
from kvquant.cache.packed_past import Past, block_table
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import NuqScheme
from tests.support.quantizers import random_quantizer
from tests.support.rope import rope, rotate


class PastCase:
    """A ragged past in a layer's store and a call over it.

    Args:
        lengths: Tokens of each sequence before the call.
        columns: Of the call.
        calls: Appends that fill the past; each that packs blocks makes an arena.
        codec: Of other codes than `nuq`.
        soft_cap: Bound of the scores.
        learned: Whether there are learned logits of attention sinks.
    """

    def __init__(
        self,
        lengths: list[int],
        columns: int,
        *,
        bits: int = 3,
        dim: int = 64,
        heads: int = 1,
        group: int = 1,
        size: int = 32,
        outliers: float = 0.01,
        sinks: int = 1,
        dtype: torch.dtype = torch.float16,
        cached: torch.dtype | None = None,
        calls: int = 3,
        factor: float = 1.0,
        device: torch.device | None = None,
        codec: Codec | None = None,
        soft_cap: float | None = None,
        learned: bool = False,
    ) -> None:
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(bits * 100 + dim)
        scale = (2.2, 3.2) if outliers else (5.0, 5.0)
        tables = random_quantizer(heads, dim, bits, zero=0.3, scale=scale, values="uniform")
        tables = tables.to(device)
        spec = NuqScheme(kind="nuq", bits=bits, outliers=outliers, block_size=size, sinks=sinks)
        self.codec: Codec = codec or NuqCodec(spec, tables)
        self.store, self.layout = BlockStore(self.codec), Layout(sinks, size, 0)
        self.soft_cap = soft_cap
        logits = torch.linspace(-2, 6, heads * group, device=device).to(dtype)
        self.sink_logits = logits if learned else None
        self.dim, self.group, self.factor, self.lengths = dim, group, factor, lengths
        batch, longest = len(lengths), max(lengths)
        kind = cached or (torch.float16 if dtype is torch.float32 else dtype)
        x = torch.randn(2, batch, heads, longest, dim, device=device)
        x[0] += tables.key_zero[:, None]
        x[1, :, :, 3:4] += 7.0  # a token far from zero
        x[:, :, :, 5:6] = 0.25  # a constant one
        x = x.to(kind)
        each = -(-longest // calls)
        for first in range(0, longest, each):
            part = x[:, :, :, first : first + each]
            spans: list[Any] = [slice(0, min(max(n - first, 0), part.shape[3])) for n in lengths]
            self.store.append(self.layout.append(spans), part[0], part[1])
        # Blocks that filled an arena at once, whoever packed them, lie as kernels expect.
        assert all(a.reserved or a._adopted is not None for a in self.store.arenas)
        for arena in self.store.arenas:
            arena.reserved = True
        self.store._reserved = True
        self.queries = torch.randn(batch, heads * group, columns, dim, device=device).to(dtype)
        self.own = torch.randn(2, batch, heads, columns, dim, device=device).to(dtype)
        begins = torch.tensor(lengths, device=device)[:, None]
        self.positions = begins + torch.arange(columns, device=device)

    def stored(self, row: int, *, fake: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 keys before RoPE and values `[heads, tokens, dim]` of a sequence."""
        view = self.layout.view()
        out = []
        blocks = [self.store.unpack(a, slice(p, p + 1)) for a, p in self.layout.table[row]]
        tails = self.store.read_tail(view, fake=fake)
        assert self.store.sinks is not None
        for i in range(2):
            sinks = self.store.sinks[i][row, :, : min(self.layout.sinks, view.lengths[row])]
            parts = [sinks, *(b[i][0] for b in blocks), tails[i][row, :, : view.tails[row]]]
            out.append(torch.cat([p.double() for p in parts], 1))
            assert out[-1].shape[1] == self.lengths[row]
        return out[0], out[1]

    def past(self, step: int, *, causal: bool = False) -> Past:
        """As :class:`KVQuantCache` makes it."""
        view = self.layout.view()
        kind = self.store.tail[0].dtype  # type: ignore[index]
        shape = self.codec.cache_shape(self.dim, 1, self.group, kind).decode_shape
        shape = replace(shape, soft_cap=self.soft_cap)
        table = block_table(self.layout, view.blocks, self.queries.device)

        def turns(p: torch.Tensor) -> Any:
            return rope(p, self.dim, self.factor)

        return Past.make(shape, self.layout, view, table, turns, step, causal=causal)

    def reference(self, *, causal: bool = False, valid: torch.Tensor | None = None) -> torch.Tensor:
        """float64 `[batch, columns, query heads, dim]`."""
        results = []
        for row, length in enumerate(self.lengths):
            keys, values = self.stored(row, fake=causal)
            device = keys.device
            cos, sin = rope(torch.arange(length, device=device)[None], self.dim, self.factor)
            keys = rotate(keys, cos.double(), sin.double())
            columns = self.positions.shape[1]
            if causal:
                at = torch.arange(length, device=device)
                seen = at[None] <= self.positions[row][:, None]
            else:
                own = self.own[:, row].double()
                keys, values = torch.cat((keys, own[0]), 1), torch.cat((values, own[1]), 1)
                seen = torch.ones(columns, columns, device=device).tril().bool()
                if valid is not None:
                    seen &= (valid[row] >= 0)[None]
                seen = torch.cat((seen.new_ones(columns, length), seen), 1)
            keys, values = (x.repeat_interleave(self.group, 0) for x in (keys, values))
            scores = self.queries[row].double() @ keys.transpose(1, 2) * self.dim**-0.5
            if self.soft_cap is not None:
                scores = self.soft_cap * (scores / self.soft_cap).tanh()
            scores = scores.masked_fill(~seen, -torch.inf)
            if self.sink_logits is not None:
                logits = self.sink_logits.double()[:, None, None].expand_as(scores[..., :1])
                scores = torch.cat((scores, logits), -1)
            weights = scores.softmax(-1).nan_to_num(0.0)[..., : keys.shape[1]]
            results.append((weights @ values).transpose(0, 1))
        return torch.stack(results)

    def attend(
        self, step: int, *, causal: bool = False, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        own = None if causal else (self.own[0], self.own[1], valid)
        past = self.past(step, causal=causal)
        given = self.queries, self.positions, self.dim**-0.5, own
        return past.attend(self.store, *given, sink_logits=self.sink_logits)


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number of a (sequence, column, head)."""
    assert torch.isfinite(found).all()
    size = expected.abs().amax(-1).clamp(min=0.05)
    return float(((found.double() - expected).abs().amax(-1) / size).max())
