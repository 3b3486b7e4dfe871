"""The table of schemes side by side: a row per model and scheme, a column per kind of measure."""

from __future__ import annotations

from kvquant.analysis.explorer.measures import Measure
from kvquant.analysis.explorer.source import Source
from kvquant.analysis.explorer.timed_measures import all_measures
from kvquant.analysis.explorer.values import Cell, Column, Row, Sheet, missing
from kvquant.analysis.suite_tables import kept_tokens

HEADLINE = "headline"


def _column(measure: Measure) -> Column:
    head = measure.label + (" [95 % interval]" if measure.name.startswith("loss-") else "")
    signed = measure.name.startswith("loss-")
    return Column(
        measure.name, head, measure.help, measure.digits, signed=signed, suite=measure.suite
    )


def sheet(source: Source) -> Sheet:
    """Returns the table, in which no cell is empty."""
    shown = [m for m in all_measures(source) if m.in_table]
    rows = []
    for model in source.study.models:
        for scheme in source.study.schemes:
            cells: dict[str, Cell] = {**source.who(model, scheme)}
            cells["kept"] = kept_tokens(source.study, scheme)
            cells |= {m.name: m.cells[model, scheme] for m in shown}
            bits = cells.get("bits", missing(""))
            rows.append(Row(cells, scheme, model, bits=bits))
    kept = Column(
        "kept",
        "16-bit tokens",
        "Of every sequence: the first ones + the latest ones.",
        text=True,
    )
    return Sheet(
        [*source.who_columns, *map(_column, shown[:1]), kept, *map(_column, shown[1:])], rows
    )
