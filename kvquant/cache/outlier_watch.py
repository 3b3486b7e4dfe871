"""Raises errors for outliers that a cache on a GPU had no room for, without blocking the host.

Packing kernels count lost outliers on the device. After a call, the host starts an asynchronous
copy of the count, which a later call reads. Errors surface on a later call; the host never blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvquant.cache.block_store import BlockStore
from kvquant.errors import NonFiniteTokens, OutlierOverflow
from kvquant.formats.head_share import HeadShare

# Outlier slots of a widened cache over the outliers that were found.
SPARE = 1.1


class OutlierWatch:
    """Watches one cache for lost outliers and non-finite input.

    Processes that share a model's kv heads must raise in the same call, as each waits for the
    others: what one of them lost counts for all, and they wait for the copy of the last blocks that
    they packed.

    Args:
        share: Which of the model's kv heads the cache has; None: all.
    """

    def __init__(self, share: HeadShare | None = None) -> None:
        self._share = share
        self._status: dict[torch.device, torch.Tensor] = {}
        # Copies of the status of each device on their way to the host, and events of their arrival.
        self._copies: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._packed = False  # whether blocks were packed since the last copy

    def status(self, device: torch.device) -> torch.Tensor | None:
        """Returns int32 `[2]` for a device's layers to report lost outliers and NaN; None on a CPU.

        Args:
            device: Device of the layers.
        """
        found = self._status.get(device)
        if found is None and device.type == "cuda":
            found = self._status[device] = torch.zeros(2, dtype=torch.int32, device=device)
        return found

    def note_packing(self) -> None:
        """Notes that a call packs blocks, so that later calls check them for lost outliers."""
        self._packed = True

    def check(self) -> None:
        """Raises for lost outliers of earlier calls that the host can know without waiting.

        Raises:
            OutlierOverflow: Outliers were lost because there was no room for them.
            ValueError: The input held NaN or Inf.
        """
        if self._copies and all(self._arrived(event) for _, event in self._copies):
            arrived, self._copies = [host for host, _ in self._copies], []
            _refuse(arrived)
        if self._packed and self._status and not self._copies:
            self._copies = [_copy_to_host(self._of_all(s)) for s in self._status.values()]
            self._packed = False

    def _arrived(self, event: torch.cuda.Event) -> bool:
        if self._share is not None:
            event.synchronize()
        return event.query()

    def _of_all(self, status: torch.Tensor) -> torch.Tensor:
        """Returns the status of all processes."""
        return status if self._share is None else self._share.largest(status.clone())

    def fork(self) -> OutlierWatch:
        """Returns the watch for a copy of the cache, which shares the blocks and their losses."""
        other = OutlierWatch(self._share)
        for device, status in self._status.items():
            other._status[device], other._packed = status.clone(), True
        return other

    def settle(self) -> None:
        """Waits for the devices and raises if one lost outliers or met NaN so far.

        Raises:
            OutlierOverflow: Outliers were lost because there was no room for them.
            ValueError: The input held NaN or Inf.
        """
        self._copies = []
        _refuse([self._of_all(status) for status in self._status.values()])


def _copy_to_host(status: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Starts a copy of the status to the host and returns it with the event of its arrival."""
    host = torch.empty(2, dtype=torch.int32, pin_memory=True)
    host.copy_(status, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(status.device))
    return host, event


def _refuse(found: Iterable[torch.Tensor]) -> None:
    """Raises for numbers of lost outliers, and for NaN or Inf, int32 `[2]` per device."""
    rows = [status.tolist() for status in found]
    lost, bad = (sum(column) for column in zip((0, 0), *rows, strict=True))
    if bad:
        raise NonFiniteTokens("keys or values")
    if lost:
        raise OutlierOverflow(
            f"outliers: {lost} found no room in the cache; the text is unlike the calibration "
            "text: calibrate on data like it, or make more room with widen() and fill anew"
        )


def widen_codecs(stores: Iterable[BlockStore]) -> None:
    """Gives later caches the outlier slots that these layers lacked; waits for the device.

    Args:
        stores: The stores of a cache's layers; only their codecs are changed.
    """
    for store in stores:
        crowding = store.crowding()
        if crowding > 1.0:
            store.codec.widen(SPARE * crowding)
