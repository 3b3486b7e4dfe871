"""`kvquant landing`: writes the landing page of the report as a part of it.

The page is HTML without scripts of its own; `workflow/report/workflow.rst` puts it into the report,
where it is what a reader sees first. All numbers on it come from tables and records.
"""

from __future__ import annotations

import argparse
import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from kvquant.analysis.evidence import NOT_ENOUGH, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED
from kvquant.analysis.explorer.data import counts
from kvquant.analysis.explorer.source import Source, load
from kvquant.analysis.explorer.view_list import shown as views
from kvquant.analysis.figure_list import FIGURES
from kvquant.analysis.landing import STYLE
from kvquant.analysis.landing.claim_rows import claim_rows, verdict_counts
from kvquant.analysis.landing.measured_on import contents, devices, digest
from kvquant.analysis.landing.results import Results, results_of
from kvquant.analysis.landing.terms import terms
from kvquant.errors import UserError
from kvquant.formats.files import read_bytes, replace
from kvquant.study.config import Study, load_study

HERE = Path(__file__).parent
MAIN = 2  # figures, the first of the list
MARKS = {SUPPORTED: "yes", NOT_SUPPORTED: "no", NOT_ENOUGH: "open", NOT_MEASURED: "none"}
TABLES = {
    "append": "cost of an appended token",
    "claims": "claims with verdicts",
    "energy": "energy jobs",
    "eval": "evaluations, a row per seed",
    "jobs": "whole jobs",
    "kernels": "kernels",
    "pareto": "a row per scheme, all axes",
    "perf": "throughput jobs",
    "samples": "every prompt and window with its score",
    "tests": "comparisons with the unquantized cache",
}


def _and(words: list[str]) -> str:
    """Returns words as an enumeration."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def sentences(source: Source) -> list[str]:
    """Returns what the study is, in two sentences."""
    study = source.study
    tasks, seeds = len(study.tasks), len(study.seeds)
    quantized = sum(spec.quantizes for spec in study.schemes.values())
    timed = study.throughput_cells() or study.job_cases() or study.kernel_cases()
    metered = study.energy_cells() or any(case.energy for case in study.job_cases().values())
    saved = ["memory", *(["time"] if timed else []), *(["energy"] if metered else [])]
    models = _and([source.labels.model(model) for model in study.models])
    return [
        "A language model keeps the keys and values of all past tokens in its KV cache; stored in "
        "fewer bits, they leave room for longer prompts and larger batches.",
        f"This study compares {quantized} such cache{'s' * (quantized != 1)} with the unquantized "
        f"one on {models}: what they lose in accuracy, over {tasks} task{'s' * (tasks != 1)} with "
        f"{seeds} seed{'s' * (seeds != 1)}, and what they save in {_and(saved)}.",
    ]


def main_figures(shown: Results) -> list[dict[str, Any]]:
    """Returns the first figures of the list, each with its drawing inside the page."""
    found = []
    for result in [shown.figures[name] for name in FIGURES if name in shown.figures][:MAIN]:
        drawing = base64.b64encode(read_bytes(Path(result.key), "--figures", "draw it again"))
        source = f"data:image/svg+xml;base64,{drawing.decode()}"
        found.append({"result": result, "source": source})
    return found


def _tables(folder: Path, report: Path) -> list[dict[str, Any]]:
    """Returns name, meaning and number of rows of the collected tables."""
    found = []
    for file in sorted(folder.glob("*.csv")):
        rows = len(pd.read_csv(file, usecols=[0])) if file.stat().st_size > 1 else 0
        about = TABLES.get(file.stem, "")
        href = os.path.relpath(file, report)
        found.append({"name": file.name, "href": href, "about": about, "rows": rows})
    return found


def page(context: Mapping[str, Any]) -> str:
    """Returns the page, in which every text is escaped."""
    files = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=files, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["thousands"] = "{:,}".format
    return environment.get_template("page.html").render(context)


def context_of(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Returns everything that the page shows."""
    source = load(study, args.tables)
    shown = results_of(study, args.results, args.figures, args.pages, args.explorer)
    file = args.tables / "claims.csv"
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tables: {file}: cannot be read ({type(error).__name__}): make it again "
            "(`kvquant claims`)"
        ) from None
    claims = list(claim_rows(table, shown))
    measured = counts(source)
    records = list(contents(study, args.results, args.device_name))
    return {
        "style": STYLE.read_text(encoding="utf-8"),
        "title": study.title or study.study,
        "sentences": sentences(source),
        "counts": measured,
        "unfinished": any(count["there"] < count["asked"] for count in measured),
        "verdicts": verdict_counts(claims),
        "marks": MARKS,
        "claims": [row for row in claims if row.is_measured],
        "unmeasured": [row for row in claims if not row.is_measured],
        "figures": main_figures(shown),
        "terms": list(terms(study)),
        "sections": shown.by_section(),
        "explorer": shown.explorer,
        "views": views(study),
        "tables": _tables(args.tables, args.results),
        "results": str(args.results),
        "published": study.published,
        "command": args.command,
        "devices": devices(records),
        "records": len(records),
        "digest": digest(records),
    }


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    context = context_of(load_study(args.study), args)
    replace(args.out, page(context))
    claims = len(context["claims"]) + len(context["unmeasured"])
    print(f"landing: {args.out}: {claims} claims, {context['records']} records")
