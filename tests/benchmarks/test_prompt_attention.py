"""8-bit attention of prompts against torch's backends, with Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch

from kvquant.benchmarks.prompt_attention import prompt_sides
from kvquant.benchmarks.timing import Clock
from kvquant.benchmarks.turns import take_turns
from kvquant.errors import UserError
from kvquant.study.kernels import KernelsSpec

CPU = torch.device("cpu")
SPEC = KernelsSpec.model_validate(
    {"cases": {"a": {"shape": "tiny", "tokens": 64, "measure": ["prompt-attention"]}}, "rounds": 5}
)


def test_every_side_is_timed_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton has no interpreter in a process that sees a GPU")
    monkeypatch.setenv("KVQUANT_KERNELS", "triton")
    sides = prompt_sides(Clock(), CPU, 2, 1, 64, 1, 64)
    assert [(side.name, side.role) for side in sides] == [
        ("8-bit", "ours"), ("flash", "fp16"), ("cudnn", "fp16"), ("efficient", "fp16"),
    ]  # fmt: skip
    take_turns(sides, SPEC)
    for side in sides:
        if side.status == "ok":
            assert len([t for t in side.times or [] if t]) == 5
        else:
            assert side.role == "fp16"
            assert side.reason


def test_without_a_kernel_nothing_is_timed() -> None:
    with pytest.raises(UserError, match="8-bit attention of a prompt: pytorch"):
        prompt_sides(Clock(), CPU, 2, 1, 64, 1, 64)
