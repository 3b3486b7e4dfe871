"""Facts of the study itself: its models, seeds and comparisons, its devices and its claims."""

from __future__ import annotations

from collections.abc import Iterator

from kvquant.analysis import claims, suite_tables
from kvquant.analysis.companion_tables import attention_companions
from kvquant.analysis.evidence import VERDICTS
from kvquant.analysis.labels import device_label
from kvquant.analysis.numbers.number import Number, fact
from kvquant.analysis.pareto import first_workload
from kvquant.analysis.provenance import records_of
from kvquant.analysis.study_tables import Tables


def numbers(t: Tables) -> Iterator[Number]:
    """Yields the facts of the study."""
    study, names = t.study, t.labels
    everything = (t.evaluations, t.perf, t.energy, t.append, t.jobs, t.kernels)
    quality = next(iter(t.pareto.quality_task), "")
    prefill = first_workload(study.throughput)
    yield fact("study", study.study)
    yield fact("title", study.title or study.study)
    yield fact("models", ", ".join(map(names.model, study.models)))
    yield fact("seeds", len(study.seeds))
    yield fact("schemes", len(study.schemes))
    yield fact("headline", names.scheme(study.headline))
    yield fact("longbench", suite_tables.suite_name(t, "longbench"), t.evaluations)
    yield fact("quality-task", names.task(quality) if quality else "no task")
    yield fact("prefill-workload", names.timed[prefill] if prefill else "no workload")
    yield fact("devices", ", ".join(map(device_label, t.devices())) or "no device", *everything[1:])
    of_levels = t.tests.level.value_counts() if len(t.tests) else {}
    yield fact("comparisons", int(of_levels.get("task", 0)), t.evaluations)
    yield fact("suite-comparisons", int(of_levels.get("suite", 0)), t.evaluations)
    yield fact("evaluations", f"{len(t.evaluations):,}", t.evaluations)
    yield fact("records", f"{len(records_of(*everything)):,}", *everything)
    companions = list(attention_companions(study))
    judged = claims.judge(t, companions)
    behind = list(everything)
    for other in companions:  # on whose records claims rest, too
        behind += [other.evaluations, other.jobs]
    for verdict in VERDICTS:
        count = int((judged.verdict == verdict).sum())
        yield fact(f"claims.{verdict.replace(' ', '-')}", count, *behind)
    yield fact("claims", len(judged), *behind)
