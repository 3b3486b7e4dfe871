"""Outliers that found no room in a cache on a GPU: noticed without waiting, told as errors.

Kernels that pack count on the device what they lost. The host has the count copied behind a call
and looks at the copy in a later one: trouble is told late, and nobody waits to hear of none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvquant.cache.block_store import BlockStore
from kvquant.errors import NonFiniteTokens, OutlierOverflow

# Room that a wider cache has beyond the outliers that were found.
SPARE = 1.1


class OutlierWatch:
    """What one cache knows of the outliers that it lost."""

    def __init__(self) -> None:
        self._status: torch.Tensor | None = None
        # A copy of the status on its way to the host, and when it is there.
        self._copy: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._packed = False  # blocks that no copy covers yet

    def status(self, device: torch.device) -> torch.Tensor | None:
        """int32 `[2]` on a GPU, where layers report lost outliers and NaN; None on a CPU."""
        if self._status is None and device.type == "cuda":
            self._status = torch.zeros(2, dtype=torch.int32, device=device)
        return self._status

    def note_packing(self) -> None:
        """Told where a call packs blocks, so that later calls look at what became of them."""
        self._packed = True

    def check(self) -> None:
        """Raises for what earlier calls lost, as far as the host can know without waiting.

        Raises:
            OutlierOverflow: Outliers were lost for want of room.
            ValueError: The input held NaN or Inf.
        """
        if self._copy is not None and self._copy[1].query():
            (lost, bad), self._copy = self._copy[0].tolist(), None
            _refuse(lost, bad)
        if self._status is not None and self._copy is None and self._packed:
            self._copy, self._packed = _copy_to_host(self._status), False

    def fork(self) -> OutlierWatch:
        """The watch of a copy of the cache: what the blocks that it shares lost, it lost too."""
        other = OutlierWatch()
        if self._status is not None:
            other._status, other._packed = self._status.clone(), True
        return other

    def settle(self) -> None:
        """Waits for the device and raises if what it packed so far is not whole.

        Raises:
            OutlierOverflow: Outliers were lost for want of room.
            ValueError: The input held NaN or Inf.
        """
        self._copy = None
        if self._status is not None:
            lost, bad = self._status.tolist()
            _refuse(lost, bad)


def _copy_to_host(status: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Starts a copy; the event says when it is there."""
    host = torch.empty(2, dtype=torch.int32, pin_memory=True)
    host.copy_(status, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _refuse(lost: int, bad: int) -> None:
    if bad:
        raise NonFiniteTokens("keys or values")
    if lost:
        raise OutlierOverflow(
            f"outliers: {lost} found no room in the cache; the text is unlike the calibration "
            "text: calibrate on data like it, or make more room with widen() and fill anew"
        )


def widen_codecs(stores: Iterable[BlockStore]) -> None:
    """Gives the next caches the room for outliers that these layers lacked; waits for the device.

    Args:
        stores: Of the layers of a cache; their codecs are changed, not they.
    """
    for store in stores:
        crowding = store.crowding()
        if crowding > 1.0:
            store.codec.widen(SPARE * crowding)
