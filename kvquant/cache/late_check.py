"""What a decode step on a GPU was given and could not be asked without waiting for the device.

Whether its mask and positions fit is worked out on the device; the host has the answer copied
behind a call and looks at it in a later one.
"""

from __future__ import annotations

import torch

_WRONG = (
    "attention_mask: a decode step hid a stored token, showed padding, or padded its own column",
    "position_ids: a decode step did not go on from the positions of its sequences",
)


def on_device(tensor: torch.Tensor) -> bool:
    """Whether looking at a tensor waits for a GPU."""
    return tensor.is_cuda


class LateCheck:
    """Of one cache."""

    def __init__(self) -> None:
        # bool [] each, of the mask and of the positions: whether any step so far was wrong
        self._status: list[torch.Tensor | None] = [None, None]
        # Its copy on the host, and when that is there; None while none is on its way
        self._copy: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._host: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._news = False

    def note(self, mask: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        """Takes in what a step found.

        Args:
            mask: bool `[]` on the device, whether the mask is wrong; None if that is known.
            positions: The same of the positions.
        """
        for i, wrong in enumerate((mask, positions)):
            if wrong is not None:
                old = self._status[i]
                self._status[i] = wrong if old is None else old | wrong
                self._news = True

    def check(self) -> None:
        """Raises for what earlier steps were given, as far as the host can know without waiting.

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
            event.record()
            self._copy, self._news = self._host, False

    def settle(self) -> None:
        """Waits for the device and raises for what it was given so far.

        Raises:
            ValueError: A mask or positions were wrong.
        """
        self._copy = None
        _refuse([status is not None and bool(status) for status in self._status])


def _refuse(found: list[bool]) -> None:
    for wrong, message in zip(found, _WRONG, strict=True):
        if wrong:
            raise ValueError(message)
