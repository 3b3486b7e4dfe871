"""Attention of decode steps without cuDNN's plans."""

from __future__ import annotations

import torch

from kvquant.models.sdpa import without_cudnn


def flags() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def test_without_cudnn_inside_and_as_before_outside() -> None:
    before = flags()
    with without_cudnn():
        assert flags() == (False, True, True, True)
    assert flags() == before
