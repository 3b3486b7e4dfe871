"""The results that the report shows, as the landing page links to them.

In the report a link shows the result with its caption. Where the page stands alone it leads to the
file beside it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kvquant.analysis import figure_list, page_list
from kvquant.analysis.explorer import view_list
from kvquant.study.config import Study


@dataclass(frozen=True)
class Result:
    """A result of the report.

    Attributes:
        key: Its path, by which the report knows it.
        href: The path from the report to the file.
        section: The folder of the report that holds it.
        label: What it shows, in a few words.
        caption: What it shows and how to read it.
    """

    key: str
    href: str
    section: str
    label: str
    caption: str


@dataclass(frozen=True)
class Results:
    """The figures, tables and explorer of a study, by name."""

    figures: dict[str, Result]
    pages: dict[str, Result]
    explorer: Result

    def all(self) -> list[Result]:
        """Returns all of them."""
        return [*self.figures.values(), *self.pages.values(), self.explorer]

    def by_section(self) -> dict[str, list[Result]]:
        """Returns them by section, in the order of sections."""
        found: dict[str, list[Result]] = {}
        for result in sorted(self.all(), key=lambda result: result.section):
            found.setdefault(result.section, []).append(result)
        return found


def _told_apart(results: dict[str, Result]) -> dict[str, Result]:
    """Returns results with their section in the labels that several of them have."""
    count = Counter(result.label for result in results.values())
    return {
        name: replace(r, label=f"{r.label} ({r.section.partition(' ')[2].lower()})")
        if count[r.label] > 1
        else r
        for name, r in results.items()
    }


def results_of(
    study: Study, report: Path, figures: Iterable[Path], pages: Iterable[Path], explorer: Path
) -> Results:
    """Returns the results of a study that are given by their files.

    Args:
        study: The study.
        report: The folder of the report.
        figures: Files of figures.
        pages: Files of tables.
        explorer: The explorer's file.

    Raises:
        UserError: A file is named after no figure or table of the study.
    """

    def result(file: Path, section: str, label: str, caption: str) -> Result:
        return Result(str(file), os.path.relpath(file, report), section, label, caption)

    drawn: dict[str, Result] = {}
    for file in figures:
        figure_list.check(study, file.stem)
        figure = figure_list.FIGURES[file.stem]
        label = f"Figure: {figure.label}"
        drawn[figure.name] = result(file, figure.section, label, figure.caption)
    written: dict[str, Result] = {}
    for file in pages:
        page_list.check(study, file.stem)
        page = page_list.PAGES[file.stem]
        written[file.stem] = result(file, page.section, f"Table: {page.label}", page.caption)
    label = view_list.LABEL[0].upper() + view_list.LABEL[1:]
    shown = result(explorer, view_list.SECTION, label, view_list.CAPTION)
    return Results(_told_apart(drawn), _told_apart(written), shown)
