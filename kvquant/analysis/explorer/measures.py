"""What schemes are compared by, and the measures of accuracy: bits, scores and losses.

A measure has a cell for every model and scheme, which holds a number or says why there is none. The
table of schemes has the first measure of each kind as a column; the scatter offers all of them, of
which at least two schemes have a number, as axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvquant.analysis.explorer.source import Source
from kvquant.analysis.explorer.tasks import LOSS_HELP, loss
from kvquant.analysis.explorer.values import (
    NOT_ASKED,
    NOT_MEASURED,
    Cell,
    is_missing,
    number,
)
from kvquant.analysis.pareto import first_task
from kvquant.analysis.suite_tables import suite_test
from kvquant.study.suite import likelihood_suites
from kvquant.study.tasks import SUITES

GROUPS = ("size", "score", "loss", "speed", "energy", "memory")
Pair = tuple[str, str]  # model and scheme
MIN_SHOWN = 2  # schemes with a number, below which an axis compares nothing


@dataclass(frozen=True)
class Measure:
    """A number of every model and scheme.

    Attributes:
        name: Its name in links.
        group: One of :data:`GROUPS`.
        label: What it is, in a few words.
        more_is_better: Its direction.
        cells: A cell of every pair of model and scheme.
        help: How to read it.
        in_table: Whether the table of schemes shows it.
        digits: Decimals in the table.
        suite: The suite that it is of; empty for none.
    """

    name: str
    group: str
    label: str
    more_is_better: bool
    cells: Mapping[Pair, Cell]
    help: str = ""
    in_table: bool = False
    digits: int | None = None
    suite: str = ""

    @property
    def measured(self) -> int:
        """Returns the number of schemes that have a number."""
        return len({scheme for (_, scheme), cell in self.cells.items() if not is_missing(cell)})


def pairs(source: Source) -> list[Pair]:
    """Returns every model with every scheme of the study."""
    return [(model, scheme) for model in source.study.models for scheme in source.study.schemes]


def _pareto(source: Source, column: str, why: Mapping[Pair, str]) -> dict[Pair, Cell]:
    """Returns the cells of a column of the table `pareto`."""
    rows = source.tables.pareto.set_index(["model", "scheme"])[column]
    return {pair: number(rows.get(pair), why[pair]) for pair in pairs(source)}


def _sizes(source: Source) -> Iterator[Measure]:
    """Yields bits per element and bytes per token, of the task that stands for all."""
    study, evaluations = source.study, source.tables.evaluations
    if evaluations.empty:
        return
    language = first_task(study, evaluations, *likelihood_suites())
    task = language or first_task(study, evaluations, *SUITES)
    if task is None:
        return
    why = {pair: source.why_no_evaluation(pair[1], task) for pair in pairs(source)}
    where = f"On {source.labels.task(task)}"
    bits = _pareto(source, "bits_per_element", why)
    text = f"{where}, of all bytes allocated: codes, scales, outliers, 16-bit tokens, unused space."
    yield Measure("bits", "size", "bits per element", False, bits, text, in_table=True, digits=2)
    sizes: dict[Pair, Cell] = {}
    for model, scheme in pairs(source):
        seeds = source.evaluations.get((model, scheme, task))
        value = None if seeds is None else seeds.cache_bytes.sum() / seeds.tokens.sum()
        sizes[model, scheme] = number(value, why[model, scheme])
    yield Measure("bytes", "size", "bytes of the cache per token", False, sizes, f"{where}.")


def _loss(source: Source, task: str) -> dict[Pair, Cell]:
    """Returns the loss of every scheme on a task."""
    cells = {}
    for model, scheme in pairs(source):
        there = (model, scheme, task) in source.evaluations
        cells[model, scheme] = loss(
            source.tests.get(("task", model, scheme, task)),
            is_baseline=scheme == source.study.baseline and there,
            why=source.why_no_evaluation(scheme, task),
        )
    return cells


def _lacking(source: Source, tasks: list[str]) -> dict[Pair, str]:
    """Returns why a scheme has no mean over tasks: it needs all of them."""
    found = {}
    for model, scheme in pairs(source):
        there = sum((model, scheme, task) in source.evaluations for task in tasks)
        reasons = {source.why_no_evaluation(scheme, task) for task in tasks}
        found[model, scheme] = (
            f"{there} of {len(tasks)} tasks"
            if there
            else (NOT_MEASURED if NOT_MEASURED in reasons else min(reasons, default=NOT_ASKED))
        )
    return found


def _suites(source: Source) -> Iterator[Measure]:
    """Yields the score and the loss of each suite, as the table `pareto` has them."""
    study, evaluations = source.study, source.tables.evaluations
    measured = set() if evaluations.empty else set(evaluations.suite)
    for name, suite in SUITES.items():
        if name not in measured:
            continue
        tasks = list(dict.fromkeys(evaluations[evaluations.suite == name].task))
        if name in likelihood_suites():
            tasks = [str(first_task(study, evaluations, name))]
        where = (
            source.labels.task(tasks[0])
            if len(tasks) == 1
            else f"{suite.label}, mean of {len(tasks)} tasks"
        )
        why, more = _lacking(source, tasks), suite.higher_is_better
        head = suite.label if name in likelihood_suites() else f"{suite.label}, %"
        values = _pareto(source, name, why)
        text = f"{where}; mean over seeds."
        yield Measure(
            f"score-{name}", "score", head, more, values, text,
            in_table=True, digits=2 if name in likelihood_suites() else 1, suite=name,
        )  # fmt: skip
        likelihood = name in likelihood_suites()
        words = f"{suite.loss_axis}, {where if likelihood else suite.label}"
        losses = {}
        for model, scheme in pairs(source):
            test = suite_test(source.tables, name, model, scheme)
            if name in likelihood_suites():
                test = source.tests.get(("task", model, scheme, tasks[0]))
            whole = not is_missing(values[model, scheme])
            losses[model, scheme] = loss(
                test if whole else None,
                is_baseline=scheme == study.baseline and whole,
                why=why[model, scheme],
            )
        yield Measure(
            f"loss-{name}", "loss", words, False, losses,
            f"{where}. {LOSS_HELP}", in_table=True, digits=2, suite=name,
        )  # fmt: skip
        if name in likelihood_suites():
            cells = _pareto(source, "kl", why)
            text = f"{where}: of the next token's distribution from the unquantized cache's."
            yield Measure("kl", "loss", "KL divergence, nats", False, cells, text, suite=name)


def _tasks(source: Source) -> Iterator[Measure]:
    """Yields the loss on each task of suites that have several."""
    study = source.study
    for name in SUITES:
        mine = [task for task, spec in study.tasks.items() if spec.suite == name]
        several = len(mine) > 1
        if name in likelihood_suites():  # whose first task stands for it
            first = first_task(study, source.tables.evaluations, name)
            mine = [task for task in mine if task != first]
        for task in mine if several else []:
            label = f"{SUITES[name].loss_axis}, {source.labels.task(task)}"
            cells = _loss(source, task)
            yield Measure(
                f"loss-{name}-{task}", "loss", label, False, cells, LOSS_HELP, digits=2, suite=name
            )


def accuracy(source: Source) -> Iterator[Measure]:
    """Yields the measures that evaluations give."""
    yield from _sizes(source)
    yield from _suites(source)
    yield from _tasks(source)
