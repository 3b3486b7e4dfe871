"""Masks of layers with sliding windows in calls with 8-bit attention, which are read once per call.

transformers makes a mask for all layers of a kind, and not all layers say how long their window is.
The mask has the length in it. A layer has to know it on the host, and whether there is padding;
on a GPU the host waits for that until all work before is done.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch


class _Read(NamedTuple):
    """What was read of a mask.

    Attributes:
        mask: The mask, while it lives.
        version: Its number of changes; None where nobody counts them (inference mode).
        window: The length of the window.
        whole: Whether all columns are tokens.
    """

    mask: weakref.ref[torch.Tensor]
    version: int | None
    window: int
    whole: bool


_LATEST = threading.local()  # `read`: that of a thread's latest mask


def window_mask(valid: torch.Tensor, window: int) -> torch.Tensor:
    """Makes the mask of layers with a sliding window.

    Args:
        valid: bool `[batch_size, kv_len]`, which columns are tokens.
        window: Number of columns that a query sees at most, at least 1.

    Returns:
        int32 `[batch_size, kv_len]`, the length of the window for tokens, 0 for padding.
    """
    return valid.to(torch.int32) * window


def read_window_mask(mask: torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """Reads the length of the window and the padding of a mask, on the host once for all layers.

    Args:
        mask: What :func:`window_mask` made, or a copy on another device.

    Returns:
        The length, 0 if there is no token; and bool `[batch_size, kv_len]`, which columns are
        tokens, None: all.
    """
    version = None if mask.is_inference() else mask._version
    latest: _Read | None = getattr(_LATEST, "read", None)
    if latest is None or latest.mask() is not mask or latest.version != version:
        low, high = mask.aminmax()
        window, whole = divmod(int(2 * high + (low > 0)), 2)
        latest = _LATEST.read = _Read(weakref.ref(mask), version, window, bool(whole))
    return latest.window, None if latest.whole else mask > 0
