"""Which of torch's attention kernels run where every call has another length."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN plans on the host for each new shape, and torch 2.11 prefers it on Hopper: a decode step of
# one layer over a growing fp16 cache took 40 ms on an H100, most likely for that (docs/kernels.md).
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def growing_lengths() -> AbstractContextManager[None]:
    """Inside, torch's attention runs without cuDNN; for decode steps of a growing cache."""
    found: AbstractContextManager[None] = sdpa_kernel(_WITHOUT_PLANS)
    return found
