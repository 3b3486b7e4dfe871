"""Progress on stderr: one updated line on a terminal, a few whole lines in a log file."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType


class Progress:
    """Shows a labelled counter as amount, total and percent.

    Args:
        label: Name of the counter.
        total: The final amount, or None while it is unknown.
        unit: Unit, printed after the amounts.
        scale: Divisor of the printed amounts (1e6 for bytes in MB).
        every: Seconds between lines in a log; a terminal is refreshed four times per second.
    """

    def __init__(
        self,
        label: str,
        total: float | None = None,
        *,
        unit: str = "",
        scale: float = 1.0,
        every: float = 10.0,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = f" {unit}" if unit else ""
        self.scale = scale
        self._terminal = sys.stderr.isatty()
        self._every = 0.25 if self._terminal else every
        self._start = self._last = time.monotonic()
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal and self._shown:
            print(file=sys.stderr)

    def _text(self, amount: float) -> str:
        digits = 1 if self.scale != 1.0 else 0
        done = f"{amount / self.scale:.{digits}f}"
        if not self.total:
            return f"{self.label}: {done}{self.unit}"
        share = min(100.0, 100.0 * amount / self.total)
        whole = f"{self.total / self.scale:.{digits}f}{self.unit}"
        return f"{self.label}: {done} of {whole} ({share:.0f} %)"

    def update(self, amount: float, *, last: bool = False) -> None:
        """Shows `amount` if enough time has passed, and always if it is the `last` one."""
        now = time.monotonic()
        if not last and now - self._last < self._every:
            return
        self._last, self._shown = now, True
        text = self._text(amount) + (f", {now - self._start:.1f} s" if last else "")
        if self._terminal:
            width = max(1, min(79, shutil.get_terminal_size().columns - 1))  # a wrapped line stays
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def on_terminal(label: str, unit: str = "") -> Iterator[Callable[[float, float], None]]:
    """Gives a function of amount and total that updates one line on a terminal, and else is silent.

    Args:
        label: Name of the counter.
        unit: Unit, printed after the amounts.
    """
    if not sys.stderr.isatty():
        yield lambda amount, total: None
        return
    with Progress(label, unit=unit) as shown:

        def update(amount: float, total: float) -> None:
            shown.total = total
            shown.update(amount, last=amount == total)

        yield update


def note(text: str) -> None:
    """Prints one line to stderr."""
    print(text, file=sys.stderr, flush=True)
