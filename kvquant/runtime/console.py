"""What verbs that people type say on standard error: spinners, and warnings as single lines."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvquant.errors import printable


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows on standard error that work is going on, where that is a terminal.

    Args:
        text: What is done.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def loading(model: object) -> Iterator[None]:
    """Shows on a terminal that a model is loaded: a spinner, or the bars of a download.

    Args:
        model: Its folder, or the id of a hub, from which it may have to come first.
    """
    local = not isinstance(model, str | Path) or Path(model).is_dir()
    if not local or not sys.stderr.isatty():
        yield
        return
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with waiting("loading the model"):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _one_line(message: Warning | str, *rest: Any, **more: Any) -> None:
    print(f"kvquant: warning: {printable(message)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def terse() -> Iterator[None]:
    """Makes libraries terse: warnings are one line each, and bars appear on a terminal alone."""
    with waiting("starting"):
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()
    shown = warnings.showwarning
    warnings.showwarning = _one_line
    try:
        yield
    finally:
        warnings.showwarning = shown
