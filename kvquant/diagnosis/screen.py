"""Prints tables and lines: with rich on a terminal, as aligned plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

MARKS = {"ok": "green", "warning": "yellow", "missing": "red", "skipped": "dim"}
ROOMY = 100  # columns of a terminal from which columns of tables stand further apart

WHOLE = 10_000  # columns in which every table fits


class Screen:
    """Prints for people.

    Args:
        console: Where; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, emoji=False, markup=False)

    @property
    def rich(self) -> bool:
        """Whether a terminal is there."""
        return self.console.is_terminal

    def line(self, text: str = "", style: str = "") -> None:
        """Prints one line, which a terminal wraps and a file does not."""
        if self.rich:
            self.console.print(Text(text, style))
        else:
            print(text, file=self.console.file)

    def table(
        self,
        heads: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str = "",
        right: Sequence[str] = (),
        wide: Sequence[str] = (),
    ) -> None:
        """Prints a table.

        Args:
            heads: Of the columns.
            rows: The cells. A row whose first cell is empty is the heading of those below it.
            title: Printed above it.
            right: Heads of the columns whose cells are aligned to the right.
            wide: Heads of the columns that are wrapped where the terminal is narrow; others are
                never cut.
        """
        if not self.rich:
            self._plain(heads, rows, title, right)
            return
        shown = Table(
            box=None,
            padding=(0, 2 if self.console.width >= ROOMY else 1, 0, 0),
            header_style="underline",
            title=title or None,
            title_justify="left",
            title_style="bold",
        )
        for head in heads:
            shown.add_column(
                head,
                justify="right" if head in right else "left",
                no_wrap=head not in wide,
                overflow="fold",
            )
        for row in rows:
            heading = "bold" if row[0] == "" else ""
            shown.add_row(*(Text(cell, MARKS.get(cell, heading)) for cell in row))
        # A number that is cut would be another one, where the terminal is too narrow for columns.
        whole = Measurement.get(self.console, self.console.options.update(width=WHOLE), shown)
        if whole.minimum > self.console.width:
            self._plain(heads, rows, title, right)
            return
        self.console.print(shown)
        self.console.print()

    def _plain(
        self, heads: Sequence[str], rows: Sequence[Sequence[str]], title: str, right: Sequence[str]
    ) -> None:
        every = [list(heads), *([cell.replace("\n", " ") for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in every) for i in range(len(heads))]
        if title:
            print(title, file=self.console.file)
        for row in every:
            cells = [
                cell.rjust(width) if head in right else cell.ljust(width)
                for cell, width, head in zip(row, widths, heads, strict=True)
            ]
            print("  ".join(cells).rstrip(), file=self.console.file)
        print(file=self.console.file)


def json_out(text: str) -> None:
    """Prints JSON on standard output, where nothing else is printed."""
    sys.stdout.write(text + "\n")
