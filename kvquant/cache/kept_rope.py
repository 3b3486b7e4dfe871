"""Keeps the rotary table of each token in a cache where positions cannot simply be counted.

Keys are stored before RoPE and rotated when they are read. As long as a token's position is its
index in its sequence, one table serves all. Otherwise (positions that jump, that count padding, or
a scaling that changes with the length) each token's cosine and sine are kept as the model gave
them, so that its key is always rotated by the original angle.
"""

from __future__ import annotations

import torch

from kvquant.cache.layout import Span
from kvquant.formats.rope import Rope

Table = tuple[torch.Tensor, torch.Tensor]


class KeptRope:
    """The cosine and sine of every token, shared by all layers of a device.

    Both halves of the channels are rotated by the same angles, so that one half is kept.
    """

    def __init__(self) -> None:
        # By device, [batch_size, room, head_dim / 2] each
        self._tables: dict[torch.device, Table] = {}

    @classmethod
    def counted(
        cls, rope: Rope, lengths: list[int], shifts: list[int], device: torch.device
    ) -> KeptRope:
        """Makes the tables of tokens with counted positions, which start at a sequence's shift."""
        kept = cls()
        longest = max(lengths, default=0)
        if longest:
            begins = torch.tensor(shifts).to(device, non_blocking=True)[:, None]
            cos, sin = rope(begins + torch.arange(longest, device=device))
            spans: list[Span] = [slice(0, n) for n in lengths]
            kept.append((cos, sin), spans, [0] * len(lengths))
        return kept

    @torch.inference_mode()  # buffers are inference tensors, whatever mode the caller is in
    def append(self, rope: Table, spans: list[Span], lengths: list[int]) -> None:
        """Adds the rotary tables of new tokens on the device where they are.

        Args:
            rope: Cosine and sine, `[1 or batch_size, new_len, head_dim]` each.
            spans: Columns of each sequence that are tokens.
            lengths: Tokens of each sequence before the call.
        """
        counts = [s.stop - s.start if isinstance(s, slice) else s.numel() for s in spans]
        total = max(n + count for n, count in zip(lengths, counts, strict=True))
        half = rope[0].shape[-1] // 2
        table = self._with_room(len(spans), total, rope[0][..., :half])
        for kept, new in zip(table, rope, strict=True):
            x = new[..., :half].detach().expand(len(spans), -1, -1).to(kept.dtype)
            if x.shape[1] == 1 and all(counts):
                rows = torch.arange(len(spans), device=kept.device)
                kept[rows, torch.tensor(lengths).to(kept.device, non_blocking=True)] = x[:, 0]
                continue
            for b, (span, at) in enumerate(zip(spans, lengths, strict=True)):
                kept[b, at : at + counts[b]] = x[b, span]

    def _held(self, device: torch.device) -> Table | None:
        """Returns the tables on a device; those of another one are copied where it has none."""
        if device not in self._tables and self._tables:
            cos, sin = next(iter(self._tables.values()))
            self._tables[device] = (
                cos.to(device, non_blocking=True),
                sin.to(device, non_blocking=True),
            )
        return self._tables.get(device)

    def _with_room(self, batch: int, tokens: int, like: torch.Tensor) -> Table:
        """Returns tables for `tokens` tokens per sequence; at least doubles what is too small."""
        old = self._held(like.device)
        if old is not None and old[0].shape[1] >= tokens:
            return old
        room = tokens if old is None else max(tokens, 2 * old[0].shape[1])
        kind = like.dtype if old is None else old[0].dtype

        def grown(which: int) -> torch.Tensor:
            new = torch.zeros((batch, room, like.shape[-1]), dtype=kind, device=like.device)
            if old is not None:
                new[:, : old[which].shape[1]] = old[which]
            return new

        table = self._tables[like.device] = (grown(0), grown(1))
        return table

    def read(self, positions: torch.Tensor) -> Table:
        """Returns the tables of the first tokens, `[batch_size, n, head_dim]` each, as a `Rope`.

        Args:
            positions: int64 `[1, n]`, the indices of the tokens from 0 on.
        """
        table, count = self._held(positions.device), positions.shape[1]
        assert table is not None
        cos, sin = (torch.cat((x[:, :count],) * 2, -1) for x in table)
        return cos, sin

    @torch.inference_mode()
    def select(self, indices: torch.Tensor) -> None:
        """Keeps or repeats the given sequences."""
        for device, (cos, sin) in self._tables.items():
            where = indices.to(device)
            self._tables[device] = (cos[where], sin[where])

    @torch.inference_mode()
    def fork(self) -> KeptRope:
        """Returns an independent copy."""
        other = KeptRope()
        for device, (cos, sin) in self._tables.items():
            other._tables[device] = (cos.clone(), sin.clone())
        return other

    @property
    def nbytes(self) -> int:
        """The bytes allocated on all devices."""
        return sum(x.nbytes for table in self._tables.values() for x in table)
