"""Progress on stderr: whole lines in a log, one line on a terminal, never more often than asked."""

from __future__ import annotations

import io
import sys

import pytest

from kvquant.runtime import progress
from kvquant.runtime.progress import Progress, note


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as a list of one number that a test changes."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_per_interval_and_the_last_one(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("download", 4e6, unit="MB", scale=1e6, every=10.0) as shown:
        shown.update(1e6)  # too early
        clock[0] += 10.0
        shown.update(2e6)
        clock[0] += 1.0
        shown.update(3e6)  # too early again
        shown.update(4e6, last=True)
    assert capsys.readouterr().err.splitlines() == [
        "download: 2.0 of 4.0 MB (50 %)",
        "download: 4.0 of 4.0 MB (100 %), 11.0 s",
    ]


def test_an_unknown_total_is_left_out_and_a_share_ends_at_100(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    Progress("windows").update(7, last=True)
    Progress("windows", 5).update(7, last=True)
    assert capsys.readouterr().err == "windows: 7, 0.0 s\nwindows: 7 of 5 (100 %), 0.0 s\n"


def test_a_narrow_terminal_has_one_line_too(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    with Progress("fetching a long file", 2) as shown:
        shown.update(2, last=True)
    assert terminal.getvalue() == "\rfetching a long fil\n"


@pytest.mark.parametrize("updates", [0, 2])
def test_a_terminal_has_one_line_that_is_ended(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("seeds", 2) as shown:
        for number in range(updates):
            clock[0] += 0.3
            shown.update(number + 1)
        written = sys.stderr
    assert isinstance(written, Terminal)
    text = written.getvalue()
    assert text.count("\r") == updates
    assert text.count("\n") == bool(updates)


def test_a_note_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    note("kept")
    assert capsys.readouterr() == ("", "kept\n")
