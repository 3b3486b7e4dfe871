"""Rows of the collected tables `eval` and `samples`, from verified records of evaluations."""

from __future__ import annotations

from typing import Any

from kvquant.analysis.problems import Problems
from kvquant.analysis.provenance import short
from kvquant.analysis.sources import Source, Sources
from kvquant.analysis.spec_checks import check_evaluation
from kvquant.errors import UserError, printable
from kvquant.study.config import Study
from kvquant.study.records import EvalRecord
from kvquant.study.samples import verified_samples
from kvquant.study.tasks import SUITES

# Metrics of some suites that tables show beside the one that statistics use.
SUITE_METRICS = tuple(metric for suite in SUITES.values() for metric in suite.table_metrics)
EVAL_FIELDS = (
    *("model", "scheme", "task", "suite", "seed", "protocol", "metric", "higher_is_better"),
    *("value", "samples", "tokens", "cache_bytes", "cache_elements", "bits_per_element"),
)
EVAL_COLUMNS = (*EVAL_FIELDS, "record", *SUITE_METRICS)
SAMPLE_COLUMNS = (
    *("model", "scheme", "task", "suite", "seed", "sample", "row", "start", "tokens", "score"),
)


def sample_score(row: dict[str, Any], suite: str) -> float:
    """Returns a sample's score: a window's mean negative log likelihood, or the suite's score."""
    if SUITES[suite].metric_type == "likelihood":
        return float(row["nll"] / row["tokens"])
    return float(row["score"])


def _verified(
    study: Study, source: Source, record: EvalRecord, problems: Problems
) -> list[dict[str, Any]] | None:
    """Returns the samples of a record that is what the study asks for; None if it is not."""
    try:
        check_evaluation(study, record)
        text, where, again = source.samples()
        return verified_samples(record, text, where, again)
    except UserError as error:
        problems.append(str(error))
    except ValueError as error:
        problems.append(f"{source.where}: {printable(error)}: {source.again}")
    return None


def eval_rows(
    sources: Sources, problems: Problems
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns a row per seed of a task and scheme, and a row per sample."""
    rows, samples = [], []
    asked: dict[tuple[str, str, int], tuple[str, str | None]] = {}
    for cell in sources.cells("eval"):
        source = sources.find(cell)
        record = problems.read(source, cell, EvalRecord)
        if record is None:
            continue
        model, scheme, task, seed = cell.names.values()
        mine = (source.where, record.prompts_sha256)
        first, prompts = asked.setdefault((model, task, seed), mine)
        if record.prompts_sha256 != prompts:
            problems.append(
                f"{source.where}: answers other prompts than {first}: delete the older one and run "
                "again"
            )
            continue
        found = _verified(sources.study, source, record, problems)
        if found is None:
            continue
        row = {name: getattr(record, name) for name in EVAL_FIELDS}
        row["record"] = short(record.seal)
        rows.append(row | {name: record.metrics.get(name) for name in SUITE_METRICS})
        for row in found:
            samples.append(
                {
                    "model": model,
                    "scheme": scheme,
                    "task": task,
                    "suite": record.suite,
                    "seed": seed,
                    "sample": int(row["index"]),
                    "row": row.get("row"),  # of a set that seeds share
                    "start": row.get("start"),  # of a window, in the text's tokens
                    "tokens": row.get("tokens"),  # of a window that are scored
                    "score": sample_score(row, record.suite),
                }
            )
    return rows, samples
