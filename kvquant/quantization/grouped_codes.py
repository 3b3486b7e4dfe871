"""Codes the channels of a head in groups, each by a rotation, a norm and levels of its width.

The channels of one head whose codes have the same width form a group. Its part of a token is split
into its norm and its direction. The direction is turned by a rotation drawn from a seed, which
makes each coordinate nearly normal with variance one over the size of the group, and coded by the
Lloyd-Max levels of that variable (TurboQuant, arXiv 2504.19874). The decoded direction is scaled to
length 1 before it is turned back, for which the stored norm, fp16, is that of the token over that
of the levels.

Rotations come from seeds alone, are shared by all caches of the process, and are no part of what a
cache stores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvquant.formats.pair_packing import PairRows
from kvquant.kernels import pytorch_fused as fused
from kvquant.quantization.exact_product import MATRIX, VECTOR, product, random_rotation, to_grid
from kvquant.quantization.lloyd_max import lloyd_max

LEVEL = 2.0**17  # levels, at most 4.6 in magnitude, are whole multiples of 1 / LEVEL
PIECE = 2**24  # elements that are coded at a time


class GroupedCodes:
    """Encodes and decodes one layer's keys or values.

    Args:
        widths: `[num_heads, head_dim / 2]`, bits per code of each pair.
        seed: Maps head and width to the seed of the group's rotation.

    Attributes:
        rows: The channels by width, which pack the codes.
        groups: Number of groups, all heads together.
    """

    def __init__(self, widths: torch.Tensor, seed: Callable[[int, int], int]) -> None:
        self.rows = PairRows(widths)
        channels, device = self.rows.channel_widths, widths.device
        of_width = torch.tensor(self.rows.widths)
        members = channels.unsqueeze(2) == of_width  # [heads, head_dim, widths]
        present = members.any(1)
        self.groups = int(present.sum())
        self._seeds = [
            (
                head,
                members[head, :, w].nonzero().view(-1).to(device),
                seed(head, self.rows.widths[w]),
            )
            for head, w in present.nonzero().tolist()
        ]
        self._members = members.to(device)
        self._present = present.view(-1).nonzero().view(-1).to(device)
        sizes = (members.sum(1, keepdim=True) * members).sum(2)
        self._root = sizes.double().sqrt().unsqueeze(1).to(device)  # [heads, 1, head_dim]
        self._levels = [
            (torch.tensor(lloyd_max(w), dtype=torch.float64) * LEVEL).round().float().to(device)
            for w in self.rows.widths
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of index tables and levels."""
        held = (self._members, self._present, self._root, *self._levels)
        return self.rows.nbytes + sum(t.nbytes for t in held)

    def _rotation(self, device: torch.device) -> torch.Tensor:
        """Returns the rotations of all groups as one matrix per head, `[heads, dim, dim]`."""
        heads, dim = self.rows.channel_widths.shape
        out = torch.zeros(heads, dim, dim, device=device)
        for head, channels, seed in self._seeds:
            at = channels.to(device)
            out[head, at[:, None], at] = random_rotation(len(channels), seed, device)
        return out

    def _spread(self, groups: torch.Tensor) -> torch.Tensor:
        """Returns `[heads, tokens, widths]` for the channels of each group, exactly."""
        return groups.double() @ self._members.double().mT

    def _levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns levels in units of `1 / LEVEL`, fp32 `[heads, tokens, head_dim]`."""
        parts = self.rows.by_width(codes)
        found = [fused.decode(p, levels) for p, levels in zip(parts, self._levels, strict=True)]
        return _by_head(self.rows.whole(found))

    def _codes(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the codes of the nearest levels of fp32 `[blocks, heads, size, head_dim]`."""
        parts = zip(self.rows.by_width(x), self._levels, strict=True)
        return self.rows.whole([fused.encode(part, levels) for part, levels in parts])

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes 16-bit `[blocks, num_heads, size, head_dim]`.

        Returns:
            uint8 codes of the same shape, and fp16 norms `[blocks, size, groups]`.
        """
        pieces = x.split(max(1, PIECE // x[0].numel()))
        found = [self._encode(piece) for piece in pieces]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = _by_head(x.float())
        magnitude = rows.abs()
        widths = range(self._members.shape[2])
        peaks = torch.stack(
            [(magnitude * self._members[:, None, :, w]).amax(-1) for w in widths], -1
        )
        grid = to_grid(rows, self._spread(peaks).float())
        members = self._members.double()
        length = product(grid.double().square(), members).sqrt_()
        turned = product(grid, self._rotation(x.device)).div_(self._spread(_not_zero(length)))
        turned = turned.mul_(self._root * (LEVEL / MATRIX)).float()
        codes = self._codes(_by_block(turned, len(x)))
        of_levels = product(self._levels_of(codes).double().square(), members).sqrt_()
        norms = length * peaks / VECTOR * LEVEL / _not_zero(of_levels)
        largest = torch.finfo(torch.float16).max
        stored = norms.transpose(0, 1).flatten(1).index_select(1, self._present)
        return codes, stored.clamp(max=largest).half().unflatten(0, (len(x), -1))

    def decode(self, codes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Decodes codes to fp32 `[blocks, num_heads, size, head_dim]`."""
        step = max(1, PIECE // codes[0].numel()) if len(codes) else 1
        pieces = zip(codes.split(step), norms.split(step), strict=True)
        return torch.cat([self._decode(*piece) for piece in pieces])

    def _decode(self, codes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        heads, _, widths = self._members.shape
        flat = norms.flatten(0, 1).double()
        full = flat.new_zeros(flat.shape[0], heads * widths).index_copy_(1, self._present, flat)
        scale = self._spread(full.unflatten(1, (heads, widths)).transpose(0, 1))
        turned = product(self._levels_of(codes), self._rotation(codes.device).mT)
        return _by_block(turned.mul_(scale / (LEVEL * MATRIX)).float(), len(codes))


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """Returns `[blocks, heads, size, head_dim]` as `[heads, blocks * size, head_dim]`."""
    return x.transpose(0, 1).flatten(1, 2)


def _by_block(rows: torch.Tensor, blocks: int) -> torch.Tensor:
    """Undoes :func:`_by_head`."""
    return rows.unflatten(1, (blocks, -1)).transpose(0, 1)


def _not_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)
