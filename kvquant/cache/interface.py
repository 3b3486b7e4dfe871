"""What a cache may offer beyond transformers' interface; the library asks for these, not for kinds.

A scheme whose cache is not made of packed blocks, unlike
:class:`kvquant.cache.kvquant_cache.KVQuantCache`, implements one or both, and
evaluation, generation and benchmarks take it as they take the others.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn


class AttendingCache(ABC):
    """A cache whose layers do the attention themselves, from keys before RoPE.

    Its layers have the method `attend` of :class:`kvquant.cache.block_layer.BlockLayer`. Other
    caches get keys after RoPE from the model's own attention, as in plain transformers.
    """

    # The inputs of a forward call of the whole model, until its decoder begins; whoever finds its
    # own inputs here is part of that call and leaves its end to it.
    outer: torch.Tensor | None = None
    within: bool = False  # whether the current call is part of one of the whole model
    # Rotary embedding of the model it was made for, by which stored keys are turned; None: not said
    rotary: nn.Module | None = None
    position_limit: int | None = None  # of the model, as its first call found it
    protocol: Literal["A", "B"]

    @abstractmethod
    def begin_forward(
        self,
        batch: int,
        new_len: int,
        mask: torch.Tensor | None,
        device: torch.device,
        positions: torch.Tensor | None = None,
        *,
        given: bool = True,
        held: bool = False,
    ) -> None:
        """Told before each forward call which columns are tokens.

        Args:
            batch: Sequences.
            new_len: New columns.
            mask: `[batch_size, columns]` with 1 = token, 0 = padding, or None for no padding.
            device: Of the model.
            positions: int64 `[1 or batch_size, new_len]` that the new columns are rotated by, or
                None: a token's number in its sequence.
            given: Whether the caller of the model gave the positions; else they are its default.
            held: The call ends with :meth:`end_forward`, else with its last layer.
        """

    @abstractmethod
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far in whole calls, padding included."""

    @abstractmethod
    def end_forward(self) -> None:
        """Told after a whole forward call that was begun as `held`; without one, does nothing."""


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
