"""Runs the probe of GPUs (:mod:`kvquant.diagnosis.gpu_probe`) and reads what it said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from kvquant.diagnosis.checks import Check
from kvquant.diagnosis.gpu_probe import STEPS

SECONDS = 120.0  # importing torch from a slow network drive takes a minute
COMMAND = (sys.executable, "-m", "kvquant.diagnosis.gpu_probe")
NEEDED = "torch"


class Probe:
    """The probe's process, which works while other checks are made.

    Args:
        command: What is run.
        seconds: After how many seconds it is given up.
    """

    def __init__(self, command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def stop(self) -> None:
        """Ends the process without waiting for what it finds."""
        self._process.kill()
        self._process.communicate()

    def checks(self) -> list[Check]:
        """Waits for the process and returns one check per step, whatever became of it."""
        try:
            said, errors = self._process.communicate(timeout=self._seconds)
            reason = _ending(self._process.returncode, errors)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, _ = self._process.communicate()
            reason = f"no answer within {self._seconds:.0f} s"
        return _read(said, reason)


def _ending(status: int, errors: str) -> str:
    """Returns in words how a process ended."""
    if status < 0:
        try:
            return f"ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"ended by signal {-status}"
    last = errors.strip().splitlines()[-1:] or [f"ended with status {status}"]
    return last[0]


def _read(said: str, reason: str) -> list[Check]:
    """Returns the checks of all steps.

    Args:
        said: The probe's lines.
        reason: How it ended, for a step that it did not finish.
    """
    done: dict[str, Check] = {}
    begun = ""
    for line in said.splitlines():
        try:
            raw = json.loads(line)
        except ValueError:
            continue  # the end of a line that was cut off
        if "begins" in raw:
            begun = raw["begins"]
        else:
            done[raw["name"]] = Check(**raw)
    found = []
    for name in STEPS:
        section = "software" if name == NEEDED else "GPU"
        if name in done:
            check = done[name]
        elif name == begun or not begun:
            fix = "check the driver (nvidia-smi); CUDA_VISIBLE_DEVICES= leaves the GPU out"
            check = Check(section, name, "missing", f"the check crashed: {reason}", fix)
            begun = begun or "none"
        else:
            check = Check(section, name, "skipped", "not looked at after the crash")
        found.append(replace(check, needed=name == NEEDED))
    return found
