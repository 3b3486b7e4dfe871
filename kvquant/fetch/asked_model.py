"""Reads which model a command line names: a folder, or an id of the hub."""

from __future__ import annotations

from kvquant.errors import UserError, printable
from kvquant.formats.files import expand_home


def asked_model(text: str) -> str:
    """Returns the folder or hub id that an option names.

    Args:
        text: The option's value. One that cannot be a hub id names a folder.

    Raises:
        UserError: It names a folder that is none, or that holds no configuration.
    """
    folder = expand_home(text, "--model")
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or folder.is_dir()
    if is_path and not (folder / "config.json").is_file():
        raise UserError(f"--model: {printable(text)} is no folder with a config.json")
    return str(folder) if is_path else text
