"""The LaTeX tables of the paper: name, caption, condition and building code of each.

A table is registered here and nowhere else: `kvquant tables` writes it, the workflow plans it, and
the paper shows it with its caption. The workflow reads this list, so it imports neither torch nor
pandas and names the building code. Each suite has a table by its own registration, and each option
that a study varies has one (:func:`of_study`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvquant.analysis.ablation import Ablation, ablations, compares_kernels, task_of
from kvquant.analysis.sections import Section
from kvquant.study.config import Study
from kvquant.study.jobs import CONTEXT_CHUNK, SEARCHED
from kvquant.study.registrations import by_name
from kvquant.study.sample_types import KL_PERCENTILES
from kvquant.study.task_families import families
from kvquant.study.tasks import SUITES
from kvquant.study.wording import told_apart

if TYPE_CHECKING:
    from kvquant.analysis.study_tables import Tables


@dataclass(frozen=True)
class LatexTable:
    """A LaTeX table and when a study has something to show in it.

    Every table but those of varied options is written for every study, so that the paper can always
    be compiled; where there is nothing to show, it says why in one sentence.

    Attributes:
        name: The name of its file.
        section: Where the paper shows it.
        caption: What it shows and how to read it, in plain text. "{suite}" stands for the suite's
            name as measured.
        build: Names the building function ("module:attribute") of (:class:`Tables`,
            *`arguments`), which returns LaTeX.
        arguments: Further arguments of `build`.
        condition: Whether collected tables have something to show in it.
        reason: Why they have not, as a sentence.
        note: Names a function ("module:attribute") of :class:`Tables` that returns a further
            sentence of the caption, or nothing; empty for none.
        of_evaluations: Whether it rests on evaluations alone, so that it is there for a study of
            which nothing was timed yet.
        reads: The collected tables that it rests on, whose records its file names.
    """

    name: str
    section: Section
    caption: str
    build: str
    arguments: tuple[str, ...] = ()
    condition: Callable[[Tables], bool] = lambda tables: True
    reason: str = ""
    note: str = ""
    of_evaluations: bool = False
    reads: tuple[str, ...] = ("evaluations",)


def _of_suite(name: str) -> LatexTable:
    """Returns the table of a suite."""
    return LatexTable(
        name=name,
        section=Section.ACCURACY_BY_TASK,
        caption=SUITES[name].caption,
        build=SUITES[name].table,
        arguments=(name,),
        condition=lambda tables: bool((tables.evaluations.suite == name).any()),
        reason=f"This study has no {SUITES[name].label} task.",
        of_evaluations=True,
    )


def _has_divergences(tables: Tables) -> bool:
    """Returns whether percentiles of the divergence or top-1 agreement were measured."""
    evaluations = tables.evaluations
    return any(
        name in evaluations and bool(evaluations[name].notna().any())
        for name in (*KL_PERCENTILES, "top1_agreement")
    )


def _has_families(tables: Tables) -> bool:
    """Returns whether a suite with several families of tasks was evaluated."""
    return any(len(families(str(suite))) > 1 for suite in tables.evaluations.suite.unique())


_LIST = (
    LatexTable(
        name="summary",
        section=Section.ACCURACY_BY_TASK,
        caption="Summary: bits per element of the cache, everything included, perplexity, and KL "
        "divergence of the next token from the unquantized cache, of the first perplexity task "
        "alone (smaller is better); means over all tasks of each other suite. A cache that was "
        "not measured on each of those tasks has a dash.",
        build="kvquant.analysis.suite_tables:summary",
    ),
    *map(_of_suite, SUITES),
    LatexTable(
        name="divergence",
        section=Section.ACCURACY_BY_TASK,
        caption="Next-token distributions against the unquantized cache's: KL divergence in nats, "
        "as mean and percentiles over all tokens of a seed, and the share of tokens at which the "
        "most probable next token is the same. Each is a mean over seeds.",
        build="kvquant.analysis.suite_tables:divergences",
        condition=_has_divergences,
        reason="This study has no percentiles of the KL divergence and no top-1 agreement.",
        of_evaluations=True,
    ),
    LatexTable(
        name="families",
        section=Section.ACCURACY_BY_TASK,
        caption="Mean score of each family of tasks.",
        build="kvquant.analysis.suite_tables:family_means",
        condition=_has_families,
        reason="This study has no suite with several families of tasks.",
        of_evaluations=True,
    ),
    LatexTable(
        name="statistics",
        section=Section.STATISTICS,
        caption="Every comparison with the unquantized cache.",
        build="kvquant.analysis.cost_tables:statistics",
        condition=lambda tables: bool(len(tables.tests)),
        reason="This study compares no scheme.",
        of_evaluations=True,
    ),
    LatexTable(
        name="throughput",
        section=Section.THROUGHPUT,
        caption="Speed over the unquantized cache, interleaved in one process (medians). The "
        "column quantize is the time to quantize and pack as a share of the unquantized prefill.",
        build="kvquant.analysis.cost_tables:throughput",
        reads=("perf",),
    ),
    LatexTable(
        name="energy",
        section=Section.ENERGY,
        caption="Energy of whole jobs over the unquantized cache. An estimate has no ratio: no "
        "claim rests on it.",
        build="kvquant.analysis.cost_tables:energy",
        note="kvquant.analysis.carbon:of_energy",
        reads=("energy",),
    ),
    LatexTable(
        name="jobs",
        section=Section.THROUGHPUT,
        caption="Whole jobs on models of random weights: prompts are prefilled one after the other "
        "and their answers decoded together, in each cache's fastest way. A case without a given "
        "number of prompts runs as many at once as fit in its memory. A step is a median; the "
        "caches of a case take turns.",
        build="kvquant.analysis.job_tables:jobs",
        condition=lambda tables: bool(len(tables.jobs)),
        reason="This study measures no whole jobs.",
        reads=("jobs",),
    ),
    LatexTable(
        name="capacity",
        section=Section.ACCURACY_AGAINST_COST,
        caption="Tokens that were held at once: prompts are prefilled beside those before until "
        "memory ends, and the last is shortened. The longest prompt is a single one prefilled in "
        f"calls of {CONTEXT_CHUNK:,} tokens. The formula divides the memory without the weights by "
        "the cache's bytes per token; it knows no activations.",
        build="kvquant.analysis.job_tables:capacity",
        condition=lambda tables: (
            bool(len(tables.jobs)) and bool(tables.jobs[list(SEARCHED)].notna().any(axis=None))
        ),
        reason="This study does not search what fits in memory.",
        reads=("jobs",),
    ),
    LatexTable(
        name="job-energy",
        section=Section.ENERGY,
        caption="Energy of the GPU board in whole jobs, by its counter: of the prefill per prompt "
        "token, of decoding per answer token, and of the job per prompt and answer token with the "
        "range of trials. Above idle leaves out what the idle board draws. Counter/power is the "
        "energy by the counter over the integral of sampled power.",
        build="kvquant.analysis.job_tables:energy",
        note="kvquant.analysis.carbon:of_jobs",
        condition=lambda tables: bool(len(tables.jobs)) and bool(tables.jobs.source.notna().any()),
        reason="This study measures no energy of whole jobs.",
        reads=("jobs",),
    ),
    LatexTable(
        name="memory",
        section=Section.ACCURACY_AGAINST_COST,
        caption="Bits per element: bytes really allocated after the prompt over elements of its "
        "tokens, on the first task of each suite, so that caches are compared at one length.",
        build="kvquant.analysis.cost_tables:memory",
    ),
)  # end of the list
TABLES = by_name(_LIST)


def _of_ablation(study: Study, ablation: Ablation) -> LatexTable:
    """Returns the table of an option that a study varies."""
    task, name = task_of(study), told_apart(study.schemes)[study.headline]
    shown = []
    if task is not None:
        likelihood = SUITES[study.tasks[task].suite].label
        on = told_apart(study.tasks)[task]
        shown.append(
            f"Bits per element, {likelihood}, its change and the KL divergence of the next token "
            f"are those of {on}, means over seeds."
        )
    if compares_kernels(study, ablation):
        shown.append(
            "Kernels run on random data: pack is the rate of quantizing and packing as a share of "
            "a copy's, and attention is the time of the fastest 16-bit decode attention over ours."
        )
    return LatexTable(
        name=f"ablation-{ablation.name}",
        section=Section.ABLATION,
        caption=f"Ablation of {ablation.label}: {name} (bold) and schemes that differ from it in "
        f"this alone. {' '.join(shown)}",
        build="kvquant.analysis.ablation_tables:latex",
        arguments=(ablation.option,),
        of_evaluations=True,
        reads=("evaluations", "kernels"),
    )


def of_study(study: Study) -> dict[str, LatexTable]:
    """Returns the tables of a study by name: all that are registered, and one per varied option."""
    return TABLES | by_name(_of_ablation(study, ablation) for ablation in ablations(study))
