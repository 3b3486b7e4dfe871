"""Choice of torch's attention kernels for decode steps over a growing cache."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN builds a plan on the host for each new shape, and torch 2.11 prefers cuDNN on Hopper. This
# is the most likely reason why a decode step of one layer over a growing fp16 cache took 40 ms on
# an H100 (docs/kernel-log.md).
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def without_cudnn() -> AbstractContextManager[None]:
    """Returns a context in which torch's attention does not use cuDNN."""
    found: AbstractContextManager[None] = sdpa_kernel(_BACKENDS)
    return found
