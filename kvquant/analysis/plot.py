"""`kvquant plot`: draws the paper's figures from collected tables alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvquant.analysis import figure_list
from kvquant.study.config import Study, load_study
from kvquant.study.dotted import load


def _not_measured(name: str) -> Any:
    """Returns a figure that says that a study has no measurement of its kind yet."""
    from kvquant.analysis.figures.style import WIDTH, plt, wrapped

    figure, axis = plt.subplots(figsize=(WIDTH, 0.6))
    axis.axis("off")
    text = wrapped(f"Nothing is measured yet: {figure_list.FIGURES[name].label}", 45)
    axis.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
    return figure


def _devices(name: str, study: Study, tables: Path) -> str:
    """Returns where what a figure shows was measured; empty for accuracy, which needs no device."""
    from kvquant.analysis.labels import device_label
    from kvquant.analysis.tables import read_table
    from kvquant.analysis.timed_on import device_of

    figure = figure_list.FIGURES[name]
    sources = (figure.table,) if figure.on_device is None else figure.on_device
    there_are = [s for s in sources if s != "jobs" or study.jobs is not None]
    found = [device_of(study, read_table(tables, source)) for source in there_are]
    there = dict.fromkeys(f"measured on {device_label(key)}" for key in found if key is not None)
    return " and ".join(there)


def _add_to_last_label(figure: Any, text: str) -> None:
    """Adds a line to the label at the bottom, where the layout leaves it room."""
    if figure.get_supxlabel():
        figure.supxlabel(f"{figure.get_supxlabel()}, {text}", fontsize=7.5)
        return
    label = figure.axes[-1].xaxis.label
    label.set_text(f"{label.get_text()}\n{text}")


def draw_figure(name: str, study: Study, tables: Path) -> Any:
    """Draws a figure in the style of the paper.

    Args:
        name: One of :data:`kvquant.analysis.figure_list.FIGURES`.
        study: The study.
        tables: The folder of collected tables.

    Returns:
        A Matplotlib figure; of a study without a measurement of this kind, one that says so.

    Raises:
        UserError: There is no such figure, or the study has nothing to show in it.
    """
    figure_list.check(study, name)
    # Late, so that a wrong name is told at once.
    from kvquant.analysis.figures.style import STYLE, NothingMeasuredError, plt
    from kvquant.analysis.tables import read_table

    if read_table(tables, figure_list.FIGURES[name].table).empty:
        with plt.rc_context(STYLE):
            return _not_measured(name)
    draw = load(figure_list.FIGURES[name].draw)
    with plt.rc_context(STYLE):
        try:
            figure = draw(study, tables)
        except NothingMeasuredError:
            return _not_measured(name)
        if where := _devices(name, study, tables):
            _add_to_last_label(figure, where)
        return figure


def draw_with_records(name: str, study: Study, tables: Path) -> tuple[Any, str]:
    """Draws a figure (:func:`draw_figure`) and says which records it shows, with their hash."""
    from kvquant.analysis.provenance import records_of, told
    from kvquant.analysis.tables import read_table, reading, sources_of

    with reading() as names:
        figure = draw_figure(name, study, tables)
    rows = (read_table(tables, source) for source in sorted(sources_of(tables, names)))
    return figure, f"from {told(records_of(*rows))}"


def save_figure(figure: Any, file: Path, source: str = "") -> None:
    """Writes a figure, in the format of the file's suffix; the same figure gives the same file.

    Args:
        figure: A Matplotlib figure.
        file: Where.
        source: What the figure shows, for the metadata of PDF and SVG.
    """
    from kvquant.analysis.figures.style import STYLE, plt

    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        ".pdf": {"CreationDate": None, "Keywords": source},
        ".svg": {"Date": None, "Description": source},
    }
    with plt.rc_context(STYLE):
        figure.savefig(file, dpi=300, metadata=metadata.get(file.suffix))


def run(args: argparse.Namespace) -> None:
    """Draws one figure into every file given."""
    figure, source = draw_with_records(args.figure, load_study(args.study), args.tables)
    for file in args.out:
        save_figure(figure, file, source)
        print(f"plot: {file}, {source}")
