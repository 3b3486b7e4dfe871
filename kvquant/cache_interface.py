"""What a cache may offer beyond transformers' interface; the library asks for these, not for kinds.

A scheme whose cache is not made of packed blocks (:class:`kvquant.cache.KVQuantCache`) implements
one or both, and evaluation, generation and benchmarks take it as they take the others.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class AttendingCache(ABC):
    """A cache whose layers do the attention themselves, from keys before RoPE.

    Its layers have the method `attend` of :class:`kvquant.block_layer.BlockLayer`. Other caches get
    keys after RoPE from the model's own attention, as in plain transformers.
    """

    @abstractmethod
    def begin_forward(
        self, batch: int, new_len: int, mask: torch.Tensor | None, device: torch.device
    ) -> None:
        """Told before each forward call which columns are tokens.

        Args:
            batch: Sequences.
            new_len: New columns.
            mask: `[batch_size, columns]` with 1 = token, 0 = padding, or None for no padding.
            device: Of the model.
        """


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
