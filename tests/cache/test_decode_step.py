"""The tables of decode steps, which calls inside and outside inference mode share."""

from __future__ import annotations

import torch

from kvquant.cache.decode_step import StepTables
from kvquant.cache.layout import Layout
from kvquant.kernels.cuda_decode import DecodeShape
from tests.support.rope import rope


def test_a_step_outside_inference_mode_follows_one_inside() -> None:
    shape = DecodeShape(3, 64, 1, 32, torch.float16, True)
    steps = StepTables(shape, lambda p: rope(p, 64), torch.device("cpu"))
    layout = Layout(1, 32, 0)
    before = layout.append([slice(0, 70), slice(0, 40)]).after
    with torch.inference_mode():
        assert steps.take_step(layout, before).tolist() == [5, 7]
    with torch.no_grad():
        assert steps.take_step(layout, before).tolist() == [5, 7]
        steps.forget()
        steps.write(layout, before.blocks, before.tails)
        assert steps.take_step(layout, before).tolist() == [5, 7]
    assert steps.lengths.tolist() == [[1, 2, 6], [1, 1, 8]]
