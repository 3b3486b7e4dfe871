"""The interfaces that a cache may implement in addition to that of transformers.

The library asks for these interfaces, not for kinds of caches. A scheme whose cache is not made of
packed blocks, unlike :class:`kvquant.cache.kvquant_cache.KVQuantCache`, counts its own bytes
(:class:`CountedCache`), computes the attention itself
(:class:`kvquant.cache.attending.AttendingCache`), or both. Evaluation, generation and benchmarks
use it as they use the others.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvquant.errors import UserError


def sequence_indices(
    name: str, given: torch.Tensor, sequences: int, *, whole: bool = False
) -> torch.Tensor:
    """Checks the indices of sequences to keep and returns them as integers.

    Args:
        name: Name of the argument in errors.
        given: int `[n]`, or bool `[sequences]`.
        sequences: Number of sequences in the cache; -1 before its first call, when there is nothing
            to check.
        whole: Whether there must be one index per sequence.

    Returns:
        int64 `[n]`, none of them negative.

    Raises:
        ValueError: The indices do not fit the cache.
    """
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{name}: must be a tensor of indices [n], got {type(given).__name__}")
    if given.dim() != 1:
        raise ValueError(f"{name}: must have one dimension, got shape {tuple(given.shape)}")
    if given.is_floating_point() or given.is_complex():
        raise ValueError(f"{name}: must be integers or bools, got {given.dtype}")
    if sequences < 0:
        return given.long()
    given = given.cpu()
    mask = given.dtype is torch.bool
    if (mask or whole) and given.numel() != sequences:
        raise ValueError(f"{name}: {given.numel()} of them, but the cache holds {sequences}")
    indices = given.nonzero().view(-1) if mask else given.long()
    if not indices.numel():
        raise ValueError(f"{name}: no sequence is kept; empty the cache by reset()")
    if not all(-sequences <= i < sequences for i in indices.tolist()):
        raise ValueError(f"{name}: {given.tolist()}, but the cache holds {sequences} sequences")
    return torch.where(indices < 0, indices + sequences, indices)


class NotCut(UserError, NotImplementedError):
    """The error for taking tokens back from a cache that cannot do so.

    Args:
        cache: What the cache is.
    """

    def __init__(self, cache: str) -> None:
        super().__init__(
            f"crop: {cache} cannot take tokens back, as guessed tokens need (prompt lookup, an "
            "assistant model): leave them out, or use another kind of scheme"
        )


class CountedCache(ABC):
    """A cache that counts its own bytes and elements."""

    @abstractmethod
    def stored_nbytes(self) -> int:
        """Returns the bytes allocated on the device."""

    def shared_nbytes(self) -> int:
        """Returns the part of `stored_nbytes` that does not grow with the number of sequences."""
        return 0

    @abstractmethod
    def stored_elements(self, mask: torch.Tensor | None) -> int:
        """Returns the number of key and value elements of tokens, without padding.

        Args:
            mask: `[batch_size, columns]` of the columns seen so far, for a cache that does not know
                what is padding; None if there is no padding.
        """


class QuantizeClock:
    """A clock for the time spent in quantization, which benchmarks report.

    Attributes:
        timed: Whether to synchronize around the work, so that the time is right on a GPU.
        quantize_seconds: Seconds of quantization since creation.
    """

    def __init__(self) -> None:
        self.timed = False
        self.quantize_seconds = 0.0

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Measures the enclosed code and adds its time."""
        if self.timed and device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        if self.timed and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.quantize_seconds += time.perf_counter() - start
