"""What a cache may offer beyond transformers' interface; the library asks for these, not for kinds.

A scheme whose cache is not made of packed blocks, unlike
:class:`kvquant.cache.kvquant_cache.KVQuantCache`, counts its own bytes (:class:`CountedCache`),
attends by itself (:class:`kvquant.cache.attending.AttendingCache`), or both; evaluation, generation
and benchmarks take it as they take the others.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def sequence_indices(
    name: str, given: torch.Tensor, sequences: int, *, whole: bool = False
) -> torch.Tensor:
    """Indices of sequences to keep, checked.

    Args:
        name: What the caller calls them.
        given: int `[n]`, or bool `[sequences]`.
        sequences: Of the cache; -1 before its first call, when there is nothing to check.
        whole: There must be one index per sequence.

    Returns:
        int64 `[n]`, none of them negative.

    Raises:
        ValueError: They do not fit the cache.
    """
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


class CountedCache(ABC):
    """A cache that counts its own bytes and elements."""

    @abstractmethod
    def stored_nbytes(self) -> int:
        """Bytes allocated on the device."""

    def shared_nbytes(self) -> int:
        """Those of `stored_nbytes` that do not grow with the number of sequences."""
        return 0

    @abstractmethod
    def stored_elements(self, mask: torch.Tensor | None) -> int:
        """Key and value elements of real tokens.

        Args:
            mask: `[batch_size, columns]` of the columns seen so far, for a cache that cannot tell
                padding itself; None if there is none.
        """


class QuantizeClock:
    """Time spent in quantization, which benchmarks report.

    Attributes:
        timed: Synchronise around the work, so that the time is right on a GPU.
        quantize_seconds: Time since creation.
    """

    def __init__(self) -> None:
        self.timed = False
        self.quantize_seconds = 0.0

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Adds the time of a block of code."""
        if self.timed and device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        if self.timed and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.quantize_seconds += time.perf_counter() - start
