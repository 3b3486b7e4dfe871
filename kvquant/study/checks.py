"""Checks a study as a whole: whether its sections agree, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvquant.energy.carbon_intensity import knows, refusal
from kvquant.errors import unknown
from kvquant.study.datasets import DATASETS
from kvquant.study.limits import MAX_NAMES, MAX_RESULTS, MAX_SEED
from kvquant.study.paths import NAME
from kvquant.study.scheme_kinds import (
    MIN_COLUMNS,
    PROMPT_ATTENTION,
    CalibratedScheme,
    CodebookScheme,
)
from kvquant.study.sections import StudySections
from kvquant.study.tasks import PerplexityTask
from kvquant.study.wording import Named, repeated_labels

MAX_NAME = 64
# Names of other curves in figures of schemes.
RESERVED_LABELS = ("concatenated arrays",)
# Names that tables and figures use in addition to the study's own keys.
TAKEN = {"models": {"any": "claims without a model"}, "schemes": {"concatenation": "append's peer"}}


def _names(study: StudySections) -> Iterator[str]:
    groups: dict[str, Iterable[str]] = {
        "models": study.models,
        "schemes": study.schemes,
        "tasks": study.tasks,
        "throughput.workloads": study.throughput.workloads,
        "energy.workloads": study.energy.workloads,
        "kernels.cases": study.kernel_cases(),
        "jobs.cases": study.job_cases(),
        "calibrations": study.calibrations,
        "datasets": study.datasets,
        "study": [study.study],
    }
    for field, names in groups.items():
        found = list(names)
        if len(found) > MAX_NAMES:
            yield f"{field}: {len(found):,} entries; at most {MAX_NAMES:,}"
        if not found and field in ("models", "schemes", "tasks"):
            yield f"{field}: must name at least one"
        for name in found:
            if not NAME.fullmatch(name):
                yield f"{field}: '{name[:MAX_NAME]}' must be kebab case ({NAME.pattern})"
            elif len(name) > MAX_NAME:
                yield f"{field}: '{name[:MAX_NAME]}...' is longer than {MAX_NAME} characters"
            elif name in TAKEN.get(field, {}):
                yield f"{field}: '{name}' is taken ({TAKEN[field][name]}); choose another name"


def _labels(study: StudySections) -> Iterator[str]:
    """Yields a problem per label that two entries have, or that figures give to something else."""
    groups: dict[str, Mapping[str, Named]] = {
        **{"models": study.models, "schemes": study.schemes, "tasks": study.tasks},
        "throughput.workloads": study.throughput.workloads,
        "energy.workloads": study.energy.workloads,
    }
    for field, specs in groups.items():
        for name, other in repeated_labels(specs):
            yield f"{field}.{name}.label: is that of '{other}' too; choose another"
        for name, spec in specs.items():
            if field == "schemes" and spec.label in RESERVED_LABELS:
                yield f"{field}.{name}.label: '{spec.label}' is taken by figures; choose another"


def _not_among(field: str, names: Iterable[str], known: Iterable[str], what: str) -> Iterator[str]:
    """Yields a problem per name of a list that is unknown or given twice."""
    seen: set[str] = set()
    for name in names:
        if name not in known:
            hint = str(unknown(what, name, known)).split(": ", 1)[1]
            yield f"{field}: '{name}' is not among the {what}s; {hint}"
        elif name in seen:
            yield f"{field}: '{name}' is given twice"
        seen.add(name)


def _schemes(study: StudySections) -> Iterator[str]:
    yield from _not_among("baseline", [study.baseline], study.schemes, "scheme")
    yield from _not_among("headline", [study.headline], study.schemes, "scheme")
    base = study.schemes.get(study.baseline)
    if base is not None and base.prompt_attention != "16-bit":
        yield (
            f"baseline: '{study.baseline}' has {PROMPT_ATTENTION} {base.prompt_attention}, and "
            "times and divergences compare with 16-bit attention: name one without the option"
        )
    for name, scheme in study.schemes.items():
        if not isinstance(scheme, CalibratedScheme):
            continue
        chosen = scheme.calibration
        if chosen is not None and chosen not in study.calibrations:
            reason = str(unknown("calibration", chosen, study.calibrations))
            yield f"schemes.{name}.calibration: {reason}"
            continue
        where = "calibration" if chosen is None else f"calibrations.{chosen}"
        fractions = study.calibrated_by(chosen).outlier_fractions
        if isinstance(scheme, CodebookScheme) and scheme.outliers not in fractions:
            yield (
                f"schemes.{name}.outliers: {scheme.outliers} is not in "
                f"{where}.outlier_fractions {fractions}; add it there"
            )


def _calibrations(study: StudySections) -> Iterator[str]:
    specs = {"calibration": study.calibration}
    specs |= {f"calibrations.{name}": spec for name, spec in study.calibrations.items()}
    for where, spec in specs.items():
        fractions = spec.outlier_fractions
        if len(set(fractions)) != len(fractions) or not all(0 <= f < 1 for f in fractions):
            yield f"{where}.outlier_fractions: must be distinct, from 0 to below 1"
        if spec.sinks >= spec.window:
            yield f"{where}.sinks: leaves no token of a window"
        yield from _text(study, spec.dataset, f"{where}.dataset")
        if spec.dataset in study.datasets and study.datasets[spec.dataset].test_share == 1:
            yield f"{where}.dataset: '{spec.dataset}' is test text only (test_share: 1)"
    for name in study.calibrations:
        if name not in study.used_calibrations():
            yield f"calibrations.{name}: no scheme is built from it; name it in one, or remove it"


def _evaluation(study: StudySections) -> Iterator[str]:
    spec = study.evaluation
    yield from _not_among("evaluation.schemes", spec.schemes, study.schemes, "scheme")
    if spec.schemes and study.baseline not in spec.schemes:
        yield f"evaluation.schemes: the baseline '{study.baseline}' is missing"
    evaluated = spec.schemes or list(study.schemes)
    for name, limited in spec.tasks.items():
        if name not in evaluated:
            yield f"evaluation.tasks: '{name}' is not among the evaluated schemes"
            continue
        if name == study.baseline:
            yield f"evaluation.tasks: the baseline '{name}' runs all tasks; remove its line"
        for wanted in limited:
            if wanted not in study.tasks:
                reason = unknown("task", wanted, study.tasks)
                yield f"evaluation.tasks.{name}: {reason}"
            elif not _can(study, name, wanted):
                yield (
                    f"evaluation.tasks.{name}: protocol {_protocol(study, wanted)} of "
                    f"'{wanted}' is one that kind '{study.schemes[name].kind}' cannot run"
                )
    for task in study.tasks:
        if study.baseline in study.schemes and not _can(study, study.baseline, task):
            yield (
                f"tasks.{task}: the baseline '{study.baseline}' cannot run its protocol "
                f"{_protocol(study, task)}, so nothing can be compared on it"
            )
    yield from _short_calls(study, evaluated)
    if spec.tasks_per_job == "all":
        yield from _shared_jobs(study, evaluated)
    for name in spec.schemes:
        if name in study.schemes and not any(_can(study, name, task) for task in study.tasks):
            yield f"evaluation.schemes: '{name}' cannot run the protocol of any task; leave it out"


def _short_calls(study: StudySections, evaluated: list[str]) -> Iterator[str]:
    """Yields the tasks all of whose calls are too short for the 8-bit attention of a scheme."""
    for name in filter(study.schemes.get, evaluated):
        if study.schemes[name].prompt_attention == "16-bit":
            continue
        for label in study.evaluation.tasks.get(name, list(study.tasks)):
            task = study.tasks.get(label)
            if not isinstance(task, PerplexityTask) or not _can(study, name, label):
                continue
            option, most = task.longest_call()
            if 0 < most < MIN_COLUMNS:
                yield (
                    f"tasks.{label}.{option}: calls of {most} tokens attend in 16 bits whatever "
                    f"{PROMPT_ATTENTION} of '{name}' says: write {MIN_COLUMNS} or more, or name "
                    f"the scheme's other tasks in evaluation.tasks.{name}"
                )


def _shared_jobs(study: StudySections, evaluated: list[str]) -> Iterator[str]:
    """Yields the problems of a study whose jobs evaluate all tasks of a scheme."""
    field = "evaluation.tasks_per_job"
    if study.gpus:
        yield f"{field}: 'all' is for studies on a CPU (gpus: 0); GPUs share out tasks: write one"
    for name in filter(study.schemes.get, evaluated):
        chosen = study.evaluation.tasks.get(name, list(study.tasks))
        lacks = [t for t in study.tasks if t not in chosen or not _can(study, name, t)]
        if lacks:
            yield f"{field}: 'all' needs '{name}' to run every task, '{lacks[0]}' too; write one"


def _protocol(study: StudySections, task: str) -> str:
    return study.tasks[task].cache_protocol()


def _can(study: StudySections, scheme: str, task: str) -> bool:
    return _protocol(study, task) in study.schemes[scheme].protocols


def _tasks(study: StudySections) -> Iterator[str]:
    for name, task in study.tasks.items():
        for option, reason in task.problems():
            yield f"tasks.{name}.{option}: {reason}"
        dataset = task.dataset_name()
        if task.own_prompts and dataset not in study.datasets:
            entries = study.datasets
            reason = str(unknown("entry", str(dataset), entries)) if entries else "none"
            yield f"tasks.{name}.dataset: must be an entry of `datasets` with prompts ({reason})"
        elif dataset is not None and not task.own_prompts:
            yield from _text(study, dataset, f"tasks.{name}.dataset")


def _text(study: StudySections, dataset: str, where: str) -> Iterator[str]:
    """Yields a problem where a data set is unknown or holds prompts."""
    known = [*DATASETS, *study.datasets]
    if dataset not in known:
        yield f"{where}: {unknown('dataset', dataset, known)}"
    elif study.holds_prompts(dataset):
        yield f"{where}: '{dataset}' holds the prompts of a task; name a data set of text"


def _datasets(study: StudySections) -> Iterator[str]:
    for name in study.datasets:
        if name in DATASETS:
            yield f"datasets: '{name}' is the name of a known data set; choose another"


def _timed(study: StudySections) -> Iterator[str]:
    for field, spec in (("throughput", study.throughput), ("energy", study.energy)):
        yield from _not_among(f"{field}.schemes", spec.schemes, study.schemes, "scheme")
        timed = spec.schemes or list(study.schemes)
        for label, workload in spec.workloads.items():
            where = f"{field}.workloads.{label}.schemes"
            yield from _not_among(where, workload.schemes, study.schemes, "scheme")
            for name in workload.schemes:
                if name in study.schemes and name not in timed:
                    yield f"{where}: '{name}' is not in {field}.schemes, so it is not measured"
    if study.append is not None:
        yield from _not_among("append.schemes", study.append.schemes, study.schemes, "scheme")
    for label, case in study.kernel_cases().items():
        measured = study.kernel_scheme(case)
        yield from _not_among(f"kernels.cases.{label}.scheme", [measured], study.schemes, "scheme")
        for name in case.peers:
            if name not in study.schemes or name in (study.baseline, measured):
                what = "measured anyway" if name in study.schemes else "not among the schemes"
                yield f"kernels.cases.{label}.peers: '{name}' is {what}"
    for label, job in study.job_cases().items():
        yield from _not_among(f"jobs.cases.{label}.schemes", job.schemes, study.schemes, "scheme")
        for name in job.schemes if job.split == "heads" else ():
            if name in study.schemes and not study.schemes[name].registration.splits_heads:
                kind = study.schemes[name].kind
                yield (
                    f"jobs.cases.{label}.schemes: '{name}' is of kind '{kind}', which codes the kv "
                    "heads of a token together, so that processes cannot share them (split: "
                    "heads); leave it out, or split by layers"
                )
    used = {
        *(study.evaluation.schemes or study.schemes),
        *study.timed_schemes(study.throughput),
    }
    if study.headline in study.schemes and study.headline not in used:
        yield (
            f"headline: '{study.headline}' is neither evaluated nor timed: add it to "
            "evaluation.schemes"
        )


def _statistics(study: StudySections) -> Iterator[str]:
    margins = study.statistics.margins
    for name, task in study.tasks.items():
        if task.suite not in margins:
            yield f"statistics.margins: no margin for the suite '{task.suite}' of the task '{name}'"


def _reproduce(study: StudySections) -> Iterator[str]:
    """Yields a problem per name that is measured again but unknown."""
    spec = study.reproduce
    if spec is None:
        return
    yield from _not_among("reproduce.schemes", spec.schemes, study.schemes, "scheme")
    yield from _not_among("reproduce.tasks", spec.tasks, study.tasks, "task")
    for seed in spec.seeds:
        if seed not in study.seeds:
            known = ", ".join(map(str, study.seeds))
            yield f"reproduce.seeds: {seed} is no seed of the study; known: {known}"


def _size(study: StudySections) -> Iterator[str]:
    """Checks the number of results by multiplication, since listing them could fill memory."""
    if len(set(study.seeds)) != len(study.seeds) or not all(
        0 <= s <= MAX_SEED for s in study.seeds
    ):
        yield f"seeds: must be distinct and not negative, at most {MAX_SEED}"
    results = len(study.schemes) * len(study.tasks) * len(study.seeds)
    for spec in (study.throughput, study.energy):
        results += len(study.schemes) * len(spec.workloads) * spec.reps
    results *= len(study.models)
    if results > MAX_RESULTS:
        yield f"reps, seeds: {results:,} results; a study has at most {MAX_RESULTS:,}"


def _countries(study: StudySections) -> Iterator[str]:
    """Yields a problem per country that CodeCarbon's offline table does not have.

    The table is not read for the defaults, so that most studies are read without CodeCarbon.
    """
    asked = {f"countries.{i}": country for i, country in enumerate(study.countries)}
    asked["energy.country"] = study.energy.country
    if study.jobs is not None:
        asked["jobs.country"] = study.jobs.country
    defaults = type(study).model_fields["countries"].default
    for field, country in asked.items():
        if country not in defaults and not knows(country):
            yield f"{field}: {refusal(country)}"
    if len(set(study.countries)) != len(study.countries):
        yield "countries: an entry is given twice"


def problems(study: StudySections) -> Iterator[str]:
    """Yields the problems of a study as a whole, one line each, the most basic ones first."""
    for check in (
        *(_names, _labels, _size, _schemes, _datasets, _calibrations, _tasks, _evaluation),
        *(_timed, _statistics, _countries, _reproduce),
    ):
        found = list(check(study))
        yield from found
        if found and check in (_names, _size, _schemes):
            return  # the later checks rely on these
