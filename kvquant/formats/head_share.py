"""A process's share of a model's kv heads, and what processes tell each other of theirs.

Under tensor parallelism each process has the same number of successive kv heads, in the order of
its rank, and the same tokens. Most tables and codes belong to one head. Where all heads of a token
share a range, the ends of the range are found together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

SIGN = -(2**31)  # the upper bit of a word


@dataclass(frozen=True)
class HeadShare:
    """The kv heads of a model that one of several processes has.

    Attributes:
        rank: Number of the process among those that share the model.
        ranks: Number of these processes; it divides the number of heads.
        heads: kv heads of the whole model.
        group: The process group; None where nothing is exchanged.
    """

    rank: int
    ranks: int
    heads: int
    group: Any = None

    @property
    def count(self) -> int:
        """The number of kv heads of this process."""
        return self.heads // self.ranks

    @property
    def own(self) -> slice:
        """The kv heads of this process."""
        return slice(self.rank * self.count, (self.rank + 1) * self.count)

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns this process's part of what all heads have along a dimension, in their order."""
        size = x.shape[dim] // self.ranks
        return x.narrow(dim, self.rank * size, size)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the largest of all processes' numbers, elementwise; `x` may be overwritten."""
        distributed.all_reduce(x, distributed.ReduceOp.MAX, group=self.group)
        return x

    def largest_words(self, words: torch.Tensor) -> torch.Tensor:
        """Does the same, in place, for int32 words that are read as unsigned."""
        return self.largest(words.bitwise_xor_(SIGN)).bitwise_xor_(SIGN)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tensors of all processes, side by side in the last dimension."""
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, -1)
