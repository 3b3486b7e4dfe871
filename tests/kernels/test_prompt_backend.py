"""The decision which backend attends in 8 bits, and its reasons, also where Triton is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvquant.kernels.backends import DeviceFacts
from kvquant.kernels.prompt_backend import decide_prompt

CODE = """
import sys
sys.modules["triton"] = None
import torch
import kvquant.evaluation.run, kvquant.models.loading, kvquant.models.prompt_attention
from kvquant.kernels.prompt_attention import attend
x = torch.randn(1, 2, 130, 64)
assert attend(x, x, x, scaling=0.125).shape == (1, 130, 2, 64)
"""


def test_without_triton_pytorch_attends() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FACTS = DeviceFacts("cuda", capability=(9, 0))


@pytest.mark.parametrize(
    ("facts", "dim", "dtype", "wished", "backend", "reason"),
    [
        (FACTS, 128, torch.float16, "auto", "cuda", ""),
        (FACTS, 128, torch.float16, "triton", "triton", "KVQUANT_KERNELS"),
        (FACTS, 256, torch.bfloat16, "auto", "triton", "head_dim: 256"),
        (FACTS, 80, torch.bfloat16, "auto", "pytorch", "head_dim: 80"),
        (FACTS, 64, torch.float32, "auto", "pytorch", "dtype: kernels read"),
        (DeviceFacts("cuda", capability=(8, 0)), 64, torch.float16, "auto", "triton", "8.0 is not"),
        (DeviceFacts("cpu"), 64, torch.float16, "auto", "pytorch", "is not a GPU"),
    ],
)
def test_the_decision(
    facts: DeviceFacts, dim: int, dtype: torch.dtype, wished: str, backend: str, reason: str
) -> None:
    selection = decide_prompt(dim, dtype, facts, wished, load=False)
    assert selection.backend == backend
    told = "\n".join(selection.lines())
    assert told.startswith(f"8-bit attention of a prompt: {backend}")
    assert reason in told
