"""What verbs that people type say on standard error: little, and nothing odd in a file."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

from kvquant.runtime.console import loading, terse, waiting


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_spinners_are_for_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    logging.enable_progress_bar()
    with waiting("thinking"):
        pass
    assert "thinking" in terminal.getvalue()
    with loading(tmp_path):  # a folder
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
    assert "loading the model" in terminal.getvalue()
    with loading("owner/name"):  # the bars of a download
        assert logging.is_progress_bar_enabled()
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with waiting("thinking"), loading(tmp_path):
        pass
    assert file.getvalue() == ""


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with terse():
            warnings.warn("texts: are short\nvery", stacklevel=1)
            assert not logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == "kvquant: warning: texts: are short\\nvery\n"
    assert warnings.showwarning is shown
    logging.enable_progress_bar()
