"""`kvquant chat`: turns from a pipe, commands, the line below an answer, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.playground.chat import status, stopping
from kvquant.playground.conversation import Turn

HELD = (
    r"\[(\d+) tokens, \d+\.\d\d bits per element, 0\.\d MB \(fp16: 0\.\d\), \S+ tokens/s(, cut)?\]"
)


def test_a_pipe_talks(
    place: Path, piped: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    piped("Hello.\nWhy?\n\n/what\n/reset\nHello.\n/exit\nnever\n")
    words = ["chat", "--model", str(place / "model"), "--device", "cpu", "--scheme", "fp8"]
    assert main([*words, "--max-new-tokens", "5"]) == 0
    said = capsys.readouterr()
    assert "over the cache FP8. A cache keeps its latest tokens in 16 bits" in said.out
    first, second, third = (int(found) for found, _ in re.findall(HELD, said.out))
    assert second > first + 5 and third == first  # it grows, and /reset begins anew
    assert "[/what is none of these: /reset" in said.out and "[0 tokens]" in said.out
    assert "never" not in said.out and not said.err


def test_a_turn_that_is_too_long_ends_no_conversation(
    place: Path, piped: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    piped("word " * 600 + "\nHello.\n")
    words = ["chat", "--model", str(place / "model"), "--device", "cpu", "--max-new-tokens", "2"]
    assert main([*words, "--scheme", "fp16"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(
        "kvquant: error: conversation: .* positions; /reset begins anew\n", said.err
    )
    assert len(re.findall(HELD, said.out)) == 1


def test_a_line_of_status_fits_80_columns() -> None:
    turn = Turn("", 1234, 98.7, 12, 123_456, 1_234_000_000, 1_500_000_000, False)
    assert status(turn).startswith(
        "[123,456 tokens, 6.58 bits per element, 1,234.0 MB (fp16: 3,000.0)"
    )
    short = Turn("", 32, 4.0, 12, 1_234, 12_340_000, 15_000_000, False)
    assert len(status(short)) <= 80 and status(short).endswith("8.0 tokens/s, cut]")


def test_ctrl_c_stops_an_answer_and_then_all() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
