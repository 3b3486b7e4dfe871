"""Checks the masks and positions of decode steps on a GPU without blocking the host.

The device computes whether they fit. After a call, the host starts an asynchronous copy of the
result, which a later call reads, so that errors surface on a later call.
"""

from __future__ import annotations

import torch

_WRONG = (
    "attention_mask: a decode step hid a stored token, showed padding, or padded its own column",
    "position_ids: a decode step did not go on from the positions of its sequences",
)


def on_device(tensor: torch.Tensor) -> bool:
    """Returns whether reading a tensor on the host waits for a GPU."""
    return tensor.is_cuda


class LateCheck:
    """Watches one cache for decode steps with a wrong mask or wrong positions."""

    def __init__(self) -> None:
        # bool [] each, for mask and positions: whether those of any step so far were wrong
        self._status: list[torch.Tensor | None] = [None, None]
        self._device: torch.device | None = None  # of both
        # A copy of the status on its way to the host and the event of its arrival, or None
        self._copy: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._host: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._news = False

    def note(self, mask: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        """Adds the results of a step's checks.

        Args:
            mask: bool `[]` on the device, whether the mask is wrong; None if it was checked.
            positions: The same for the positions.
        """
        for i, wrong in enumerate((mask, positions)):
            if wrong is not None:
                self._device = self._device or wrong.device
                wrong = wrong.to(self._device, non_blocking=True)
                old = self._status[i]
                self._status[i] = wrong if old is None else old | wrong
                self._news = True

    def check(self) -> None:
        """Raises for wrong input to earlier steps that the host can know without waiting.

        Raises:
            ValueError: A mask or positions were wrong.
        """
        if self._copy is not None and self._copy[1].query():
            found, self._copy = self._copy[0].tolist(), None
            _refuse(found)
        if self._news and self._copy is None:
            if self._host is None:
                self._host = (torch.zeros(2, dtype=torch.bool, pin_memory=True), torch.cuda.Event())
            host, event = self._host
            for i, status in enumerate(self._status):
                if status is not None:
                    host[i].copy_(status, non_blocking=True)
            event.record(torch.cuda.current_stream(self._device))
            self._copy, self._news = self._host, False

    def settle(self) -> None:
        """Waits for the device and raises if any step so far had wrong input.

        Raises:
            ValueError: A mask or positions were wrong.
        """
        self._copy = None
        _refuse([status is not None and bool(status) for status in self._status])


def _refuse(found: list[bool]) -> None:
    for wrong, message in zip(found, _WRONG, strict=True):
        if wrong:
            raise ValueError(message)
