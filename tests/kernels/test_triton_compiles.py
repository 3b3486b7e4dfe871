"""Every Triton kernel compiles for a GPU, also where there is none.

Triton's interpreter, by which the other tests run kernels on a CPU, accepts programs that the
compiler refuses.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_kernel_compiles_without_a_gpu(root: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_compile"],
        capture_output=True,
        text=True,
        cwd=root,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[1] for line in done.stdout.splitlines() if line}
    launched = {
        name
        for file in (root / "kvquant/kernels").glob("triton_*.py")
        for name in re.findall(r"\b(_\w+)\[(?:\(|grid)", file.read_text(encoding="utf-8"))
    }
    assert compiled == launched
