"""The page of a comparison: the outcome first, then a table per kind of result."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvquant.analysis.explorer.page import HERE as EXPLORER
from kvquant.analysis.explorer.page import policy
from kvquant.analysis.reproduction.result import Reproduction
from kvquant.analysis.reproduction.rows import (
    DIFFERS,
    NOT_RUN,
    REPRODUCED,
    SHOWN,
    UNDECIDED,
    Row,
)
from kvquant.analysis.reproduction.tolerances import TOLERANCES
from kvquant.study.config import Study

HEADINGS = {
    "eval": "Accuracy",
    "throughput": "Throughput",
    "energy": "Energy",
    "append": "Appending",
    "kernels": "Kernels",
    "jobs": "Whole jobs",
}
ORDER = (DIFFERS, UNDECIDED, REPRODUCED, SHOWN)  # of rows: what needs a look comes first
MARKS = {REPRODUCED: "yes", DIFFERS: "no"}
HEADS = ("what", "quantity", "verdict", "published", "own", "difference", "tolerance", "note")
NUMBERS = ("published", "own", "difference")
MEANINGS = {
    REPRODUCED: "Equal where values must be equal; a ratio within its tolerance; or a mean "
    "difference of pairs whose interval lies inside the margin (two one-sided tests), or that is "
    "zero in every pair.",
    DIFFERS: "Not equal; a ratio outside its tolerance; or an interval wholly outside the margin.",
    UNDECIDED: "The interval reaches over the margin: too few samples were measured again to tell.",
    SHOWN: "Times, rates and energies by themselves belong to a device.",
}
ADDED = """
.counts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: .6rem 0; padding: 0;
  list-style: none; }
.counts b { font-size: 1.5rem; display: block; font-variant-numeric: tabular-nums; }
#summary { font-weight: 600; }
"""


def _number(value: Any) -> str:
    """Returns a value with as many digits as tell it from its neighbour."""
    if value is None:
        return ""
    if isinstance(value, str):
        return html.escape(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.4g}"


def _difference(row: Row) -> str:
    """Returns the difference with its interval, or nothing where there is none."""
    if row.difference is None:
        return ""
    share = row.difference_unit == "of the published value"

    def told(value: float) -> str:
        if value == 0:
            return "0"
        return f"{value:+.1%}" if share else f"{value:+.4g}"

    text = told(row.difference)
    if row.low is not None and row.high is not None:
        ends = f"{told(row.low)} to {told(row.high)}" if math.isfinite(row.low) else "no interval"
        text += f"<br><span class='ends'>({ends})</span>"
    return text


def _cells(row: Row) -> str:
    about = row.subject
    name = " / ".join(filter(None, (about.scheme, about.what)))
    unit = f" <span class='ends'>{html.escape(row.unit)}</span>" if row.unit else ""
    mark = f" class='{MARKS[row.verdict]}'" if row.verdict in MARKS else ""
    return (
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(row.quantity)}{unit}</td>"
        f"<td{mark}>{row.verdict}</td><td class='number'>{_number(row.published)}</td>"
        f"<td class='number'>{_number(row.own)}</td><td class='number'>{_difference(row)}</td>"
        f"<td>{html.escape(row.tolerance)}</td><td>{html.escape(row.note)}</td></tr>"
    )


def _table(heads: Iterable[str], body: Iterable[str], label: str) -> str:
    head = "".join(
        f"<th scope='col'{' class=number' if name in NUMBERS else ''}>{name}</th>" for name in heads
    )
    return (
        f"<div class='box' role='region' tabindex='0' aria-label='{html.escape(label)}'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _where(rows: list[Row]) -> str:
    """Returns a list of the devices and versions of both sides."""
    lines = []
    for side in ("published", "own"):
        told = dict.fromkeys(
            f"{getattr(r.subject, f'{side}_device')}: {getattr(r.subject, f'{side}_versions')}"
            for r in rows
        )
        lines.append(f"<dt>{side.capitalize()}</dt><dd>{html.escape('; '.join(told))}</dd>")
    again = sorted({r.subject.scheme for r in rows if "again" in r.subject.quantizer})
    if again:
        named = f"calibrated again, not the published ones: {', '.join(again)}"
        lines.append(f"<dt>Quantizers</dt><dd>{html.escape(named)}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _section(stage: str, heading: str, rows: list[Row]) -> str:
    mine = [r for r in rows if r.subject.stage == stage and r.verdict != NOT_RUN]
    if not mine:
        return ""
    mine.sort(key=lambda row: ORDER.index(row.verdict))
    return f"<h2>{heading}</h2>{_where(mine)}{_table(HEADS, map(_cells, mine), heading)}"


def _not_run(rows: list[Row]) -> str:
    left = [row for row in rows if row.verdict == NOT_RUN]
    if not left:
        return ""
    body = (
        f"<tr><th scope='row'>{HEADINGS[r.subject.stage]}</th>"
        f"<td>{html.escape(' / '.join(filter(None, (r.subject.scheme, r.subject.what))))}</td>"
        f"<td class='number'>{r.subject.results}</td><td>{html.escape(r.note)}</td></tr>"
        for r in left
    )
    table = _table(("kind", "what", "results", "note"), body, "Not run")
    return f"<h2>Not run</h2><details><summary>{len(left):,} entries</summary>{table}</details>"


def _meanings() -> str:
    body = (
        f"<tr><th scope='row'>{html.escape(rule.name)}</th><td>{rule.kind}</td>"
        f"<td>{html.escape(rule.text)}</td><td>{html.escape(rule.why)}</td></tr>"
        for rule in TOLERANCES.values()
    )
    table = _table(("quantity", "how", "tolerance", "why"), body, "Tolerances")
    verdicts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in MEANINGS.items())
    return (
        f"<h2>What the verdicts mean</h2><dl>{verdicts}</dl>"
        f"<details><summary>Tolerances</summary>{table}</details>"
    )


def page(study: Study, result: Reproduction, archive: Path) -> str:
    """Returns the page, which needs no script and no network.

    Args:
        study: The study.
        result: The comparison.
        archive: Folder of the published records, as it is named in the page.
    """
    style = (EXPLORER / "page.css").read_text(encoding="utf-8") + ADDED
    title = html.escape(f"{study.title or study.study}: measured again")
    counts = "".join(
        f"<li><b{f' class={MARKS[verdict]}' if verdict in MARKS else ''}>"
        f"{result.missing if verdict == NOT_RUN else result.count(verdict):,}</b>{verdict}"
        f"{f', {result.planned:,} of them planned' if verdict == NOT_RUN else ''}</li>"
        for verdict in (REPRODUCED, DIFFERS, UNDECIDED, SHOWN, NOT_RUN)
    )
    alone = ""
    if result.alone:
        alone = f"<p>{result.alone:,} own results have no published counterpart.</p>"
    sections = "".join(_section(stage, head, result.rows) for stage, head in HEADINGS.items())
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style, ())}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{title}</title><link rel='icon' href='data:,'><style>{style}</style></head>\n"
        f"<body><header><h1>{title}</h1><p id='summary'>{html.escape(result.summary)}</p>"
        f"<ul class='counts'>{counts}</ul>"
        f"<p id='facts'>Published: {html.escape(archive.as_posix())}. Values are of the seeds that "
        f"both sides measured; intervals have level {1 - study.statistics.alpha:.0%}.</p>{alone}"
        f"</header><main>{sections}{_not_run(result.rows)}{_meanings()}</main></body></html>\n"
    )
