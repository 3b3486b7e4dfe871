"""Rows of the collected tables `eval` and `samples`, from verified records of evaluations."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from kvquant.analysis.problems import Problems
from kvquant.analysis.spec_checks import check_evaluation
from kvquant.errors import UserError, printable
from kvquant.formats.files import read_text
from kvquant.study.config import Study
from kvquant.study.digests import eval_digest
from kvquant.study.records import AGAIN, EvalRecord, absent
from kvquant.study.samples import verified_samples
from kvquant.study.tasks import SUITES

# Metrics of some suites that tables show beside the one that statistics use.
SUITE_METRICS = tuple(metric for suite in SUITES.values() for metric in suite.table_metrics)
MEASURE_BOTH = "delete it and run.json beside it to measure the seed again"


def _sample_score(row: dict[str, Any], suite: str) -> float:
    """Returns a sample's score: a window's mean negative log likelihood, or the suite's score."""
    if SUITES[suite].metric_type == "likelihood":
        return float(row["nll"] / row["tokens"])
    return float(row["score"])


def _verified(
    study: Study, file: Path, record: EvalRecord, problems: Problems
) -> list[dict[str, Any]] | None:
    """Returns the samples of a record that is what the study asks for; None if it is not."""
    lines = file.with_name("samples.jsonl")
    try:
        check_evaluation(study, record)
        text = "" if absent(lines) else read_text(lines, "samples", MEASURE_BOTH)
        return verified_samples(record, text, lines, MEASURE_BOTH)
    except UserError as error:
        problems.append(str(error))
    except ValueError as error:
        problems.append(f"{file}: {printable(error)}: {AGAIN}")
    return None


def eval_rows(
    study: Study, results: Path, problems: Problems
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns a row per seed of a task and scheme, and a row per sample."""
    rows, samples = [], []
    asked: dict[tuple[str, str, int], tuple[Path, str | None]] = {}
    cells = product(study.models, study.schemes, study.tasks, study.seeds)
    for model, scheme, task, seed in cells:
        if not study.evaluates(scheme, task):
            continue
        names: dict[str, Any] = {"model": model, "scheme": scheme, "task": task, "seed": seed}
        file = results / "eval" / model / scheme / task / f"seed{seed}" / "run.json"
        expected = eval_digest(study, model, scheme, task, seed)
        record = problems.read(file, EvalRecord, expected, names)
        if record is None:
            continue
        mine = (file, record.prompts_sha256)
        first, prompts = asked.setdefault((model, task, seed), mine)
        if record.prompts_sha256 != prompts:
            problems.append(
                f"{file}: answers other prompts than {first}: delete the older one and run again"
            )
            continue
        found = _verified(study, file, record, problems)
        if found is None:
            continue
        keep = ["model", "scheme", "task", "suite", "seed", "protocol", "metric"]
        keep += ["higher_is_better", "value", "samples", "tokens"]
        keep += ["cache_bytes", "cache_elements", "bits_per_element"]
        row = {name: getattr(record, name) for name in keep}
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
                    "score": _sample_score(row, record.suite),
                }
            )
    return rows, samples
