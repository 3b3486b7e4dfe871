"""Where the blocks that are packed lie among the tokens of a call.

A call brings many sequences of different lengths. Their blocks are packed by one launch, which
reads each block where it lies, instead of one launch per sequence.
"""

from __future__ import annotations

import torch


def block_count(x: torch.Tensor, places: torch.Tensor | None) -> int:
    """Returns how many blocks there are.

    Args:
        x: `[sequences, num_heads, tokens, head_dim]`.
        places: int32 `[blocks, 2]`, sequence and first token of each block; None: each sequence of
            `x` is one block.
    """
    return x.shape[0] if places is None else places.shape[0]


def gathered(x: torch.Tensor, places: torch.Tensor | None, size: int) -> torch.Tensor:
    """Returns blocks `[blocks, num_heads, block_size, head_dim]`, for readers of whole tensors.

    Args:
        x: `[sequences, num_heads, tokens, head_dim]`.
        places: As of :func:`block_count`.
        size: Tokens per block.
    """
    if places is None:
        return x
    sequences, first = places.long().unbind(1)
    tokens = first[:, None] + torch.arange(size, device=x.device)
    return x[sequences[:, None], :, tokens].transpose(1, 2)
