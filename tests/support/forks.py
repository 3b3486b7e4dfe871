"""Work in forks of the process of the tests, which need not import anything.

Such a process cannot compute gradients once its parent has. No GPU must be in use.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

SECONDS = 120  # after which a fork is ended


def in_child(function: Callable[[], int], into: int) -> NoReturn:
    """Turns a fork into a process that calls a function.

    Args:
        function: Gives the exit status.
        into: The file of standard output and error.
    """
    status = 99
    try:
        signal.alarm(SECONDS)
        os.dup2(into, 1)
        os.dup2(into, 2)
        # pytest keeps its own streams in their places
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        status = function()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(function: Callable[[], int]) -> tuple[int, int]:
    """Calls a function in a process of its own: its number, and a pipe with what it prints."""
    out, into = os.pipe()  # no file: some tests limit the size of files
    child = os.fork()
    if not child:
        in_child(function, into)
    os.close(into)
    return child, out


def ended(child: int, out: int) -> tuple[int, str]:
    """A process's exit status and what it printed."""
    with os.fdopen(out, errors="replace") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def forked(function: Callable[[], int]) -> tuple[int, str]:
    """Calls a function in a process of its own: its exit status and what it printed."""
    return ended(*start(function))


def as_module(command: Sequence[str | Path], env: Mapping[str, str]) -> Callable[[], int]:
    """A function that does what the command `python -m MODULE ARGUMENTS` does."""
    python, option, module, *words = map(str, command)
    assert (python, option) == (sys.executable, "-m")

    def function() -> int:
        os.environ.clear()
        os.environ.update(env)
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0

    return function


class ForkedPopen:
    """Takes the place of `subprocess.Popen` for `python -m MODULE ARGUMENTS`."""

    def __init__(
        self,
        args: Sequence[str | Path],
        *,
        stdout: BinaryIO,
        stderr: BinaryIO,
        env: Mapping[str, str],
    ) -> None:
        assert stdout is stderr
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            in_child(as_module(args, env), stdout.fileno())

    def _seen(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def poll(self) -> int | None:
        """The exit status; None while the process runs."""
        return self._seen(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit status, once the process has ended."""
        return self._seen(0)

    def kill(self) -> None:
        """Ends the process."""
        os.kill(self.pid, signal.SIGKILL)
