"""Compiles quanto's CUDA kernels in one process at a time, even after a compilation was killed.

Quanto compiles its kernels at their first use, into its own folder and behind a lock file
(`torch.utils.file_baton`). A process that is killed meanwhile leaves that file behind, and all
later processes wait for ever. Here processes take turns with an advisory `flock`, which the system
releases when its holder ends. The holder knows that no other process of this library is compiling,
and removes a lock file that was left behind.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import tempfile
from pathlib import Path

from kvquant.errors import UserError
from kvquant.runtime.devices import one_at_a_time
from kvquant.runtime.private_folder import private_folder

NAME = "quanto_cuda"


def _turns(folder: Path) -> Path:
    """Returns the folder where this user's processes take turns for one installation of quanto.

    It lies outside of the installation, which may be read-only.
    """
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"kvquant-quanto-{os.getuid()}-{name}"


@functools.cache
def build() -> None:
    """Compiles the kernels where that was not done yet, and loads them.

    Nothing is done where quanto has no CUDA kernels for this machine.

    Raises:
        UserError: They cannot be compiled; the message ends with the compiler's last line.
    """
    extensions = importlib.import_module("optimum.quanto.library.extensions")
    if not extensions.is_extension_available(NAME):
        return
    extension = extensions.get_extension(NAME)
    folder = Path(extension.build_directory)
    turns = _turns(folder)
    if private_folder(turns) is None:
        raise UserError(
            f"scheme kind 'hf-quanto': {turns}, where processes take turns to compile, is not a "
            "folder of this user alone: remove it, or set TMPDIR"
        )
    with one_at_a_time(turns):
        left = folder / "lock"
        if left.exists() and left.stat().st_uid == os.getuid():
            left.unlink()
        try:
            _ = extension.lib
        except (RuntimeError, OSError, ImportError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"scheme kind 'hf-quanto': quanto's CUDA kernels could not be compiled, which "
                f"needs nvcc and ninja ({said[-1]})"
            ) from error
