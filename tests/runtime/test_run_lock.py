"""The lock of a study's results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.runtime import run_lock

HOLDER = """
import sys, time
from kvquant.runtime.run_lock import hold
hold(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_second_run_is_refused_until_the_first_is_killed(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "results"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing"):
            run_lock.hold(folder)
        first.kill()  # SIGKILL: no clean-up by the holder
        first.wait()
    run_lock.hold(folder)
