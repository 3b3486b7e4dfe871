"""The decision about 8-bit attention is made where Triton is not installed, too."""

from __future__ import annotations

import subprocess
import sys

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
