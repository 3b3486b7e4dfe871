"""The figures of a study: name, caption, condition to exist and drawing code of each.

A figure is registered here and nowhere else. The workflow plans it, `kvquant plot` draws it, and
the report and the paper show its caption. The workflow reads this list, so it imports neither torch
nor pandas and names the drawing code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvquant.analysis.ablation import drawable
from kvquant.analysis.sections import Section
from kvquant.errors import UserError, unknown
from kvquant.study.config import Study
from kvquant.study.jobs import CONTEXT_CHUNK
from kvquant.study.registrations import by_name
from kvquant.study.tasks import PasskeyTask


@dataclass(frozen=True)
class Figure:
    """A figure and when a study has it.

    Attributes:
        name: The name of its files.
        section: Where the report and the paper show it.
        label: What it shows, in a few words.
        caption: What it shows and how to read it, in plain text.
        condition: Whether a study has something to show in it.
        reason: Why a study has not; follows the words "the study".
        draw: Names the drawing function ("module:attribute") of (study, folder of collected
            tables), which returns a Matplotlib figure.
        table: The collected table without which it says that nothing was measured yet.
        on_device: The tables whose device it names; None: `table`.
    """

    name: str
    section: Section
    label: str
    caption: str
    condition: Callable[[Study], bool]
    reason: str
    draw: str
    table: str = "eval"
    on_device: tuple[str, ...] | None = None


def _compares(study: Study, suite: str | None = None) -> bool:
    """Returns whether a scheme is compared with the baseline on a task, of one suite if given."""
    return any(
        study.evaluates(scheme, name)
        for name, task in study.tasks.items()
        if suite in (None, task.suite)
        for scheme in study.schemes
        if scheme != study.baseline
    )


def _has_passkey_lengths(study: Study) -> bool:
    """Returns whether the passkey tasks have at least two lengths."""
    return len({t.length for t in study.tasks.values() if isinstance(t, PasskeyTask)}) > 1


def _has_lengths(study: Study) -> bool:
    """Returns whether whole jobs have prompts of several lengths, or several numbers of them."""
    lengths: dict[str, set[int]] = {}
    batches: dict[tuple[str, int, int], set[int]] = {}
    for case in study.job_cases().values():
        if case.batch_size is None or not case.given_prompts:
            continue
        if case.batch_size == 1:
            lengths.setdefault(case.shape, set()).add(case.prompt)
        batches.setdefault((case.shape, case.prompt, case.answer), set()).add(case.batch_size)
    return any(len(found) > 1 for found in (*lengths.values(), *batches.values()))


def _searches(study: Study) -> bool:
    """Returns whether a case of whole jobs searches what fits in memory."""
    return any(case.capacity or case.context for case in study.job_cases().values())


def _meters_jobs(study: Study) -> bool:
    """Returns whether a case of whole jobs measures energy."""
    return any(case.energy for case in study.job_cases().values())


def _has_attention(study: Study) -> bool:
    """Returns whether a case of kernels measures attention."""
    return any("attention" in case.measure for case in study.kernel_cases().values())


_LIST = (
    Figure(
        name="pareto",
        section=Section.ACCURACY_AGAINST_COST,
        label="accuracy, memory, throughput and energy",
        caption="Accuracy lost against bits per element, bytes of the cache per token, throughput "
        "and energy per token. Each marker is a cache scheme. Losses and sizes are those of the "
        "task on the vertical axis, throughput and energy those of the workload that a panel's "
        "label names; whole jobs are of a shape with random weights. Of several models, each has a "
        "column of panels. The bits in a scheme's name "
        "are those of its codes, or of full blocks for allocated codes; the horizontal axis counts "
        "all that is allocated. Down is closer to the unquantized cache. Vertical bars are 95 % "
        "intervals over seeds; horizontal bars are the spread of seeds (sizes), of rounds and "
        "repetitions (throughput), or of trials and repetitions (energy). The line joins the "
        "schemes that no other scheme beats in that panel, and a hollow marker is beaten. Energy "
        "is shown where counters measured it. Where speed or energy was measured, schemes without "
        "either are left out unless no other beats them in size; the figure of loss against bits "
        "has them.",
        condition=_compares,
        reason="compares no scheme with the baseline",
        draw="kvquant.analysis.figures.pareto:draw",
        on_device=("perf", "energy", "jobs"),
    ),
    Figure(
        name="quality",
        section=Section.ACCURACY_AGAINST_COST,
        label="loss against bits, a curve per method",
        caption="Loss over the unquantized cache against bits per element with everything "
        "included, a curve per method. Bars are 95 % confidence intervals of the paired "
        "differences, and many are smaller than their markers. Filled markers keep the same tokens "
        "in 16 bits as the headline scheme; hollow markers keep those of the method's publication, "
        "or none. A scheme that keeps others belongs to no curve. The vertical axis is linear "
        "below 1 and logarithmic above.",
        condition=_compares,
        reason="compares no scheme with the baseline",
        draw="kvquant.analysis.figures.quality:draw",
        on_device=(),
    ),
    Figure(
        name="perplexity",
        section=Section.ACCURACY_BY_TASK,
        label="perplexity",
        caption="Increase of perplexity over the unquantized cache, paired by seed, with a panel "
        "per model and task. Bars are 95 % confidence intervals over seeds, and small dots are the "
        "single seeds. Of a method that was measured with the 16-bit tokens of the headline "
        "scheme, schemes with others are left out.",
        condition=lambda study: _compares(study, "perplexity"),
        reason="compares no scheme on a perplexity task",
        draw="kvquant.analysis.figures.perplexity:draw",
    ),
    Figure(
        name="throughput",
        section=Section.THROUGHPUT,
        label="prefill and decode against the baseline",
        caption="Speed of prefill and decode over the unquantized cache, measured in turns in one "
        "process, with a row of panels per model. A marker has the look of its scheme and is "
        "filled by workload. Markers are medians over repetitions, and bars span the 10th to "
        "90th percentile of the rounds of all repetitions. Right of 1 a scheme is faster.",
        condition=lambda study: bool(study.throughput_cells()),
        reason="times no workload of a scheme",
        draw="kvquant.analysis.figures.throughput:draw",
        table="perf",
    ),
    Figure(
        name="passkey",
        section=Section.ACCURACY_BY_TASK,
        label="passkey by length and depth",
        caption="Share of passkeys that were found, by prompt length and by depth of the key in "
        "the prompt, over all seeds, with a panel per model and scheme.",
        condition=_has_passkey_lengths,
        reason="has passkey tasks of fewer than two lengths",
        draw="kvquant.analysis.figures.passkey:draw",
    ),
    Figure(
        name="append",
        section=Section.THROUGHPUT,
        label="cost of an appended token by cache size",
        caption="Time of one more token when the cache of one layer already holds many. It "
        "includes quantization, packing of the token's block and storage, and no reading of the "
        "cache. Our cache writes into memory that is already allocated. Concatenated arrays are "
        "the same quantizer with arrays that every call allocates and copies anew, as KVQuant's "
        "public code does, and the 16-bit cache is the growing one of transformers. Bands span the "
        "10th to 90th percentile of rounds that take turns in one process.",
        condition=lambda study: study.append is not None,
        reason="has no section 'append'",
        draw="kvquant.analysis.figures.append:draw",
        table="append",
    ),
    Figure(
        name="kernels",
        section=Section.THROUGHPUT,
        label="kernels against their floor, fp16 and peers",
        caption="Left: share of the rate of a device copy that each kernel reaches, over the bytes "
        "that it has to read and write; a kernel that only reads can exceed a copy. Middle and "
        "right: time of fp16 and of peers over ours, in turns in one process; right of 1 ours "
        "is faster, and a peer's marker is filled by what was measured. Attention in fp16 is "
        "PyTorch's, by backend; steps and prefills in fp16 run over transformers' growing cache. "
        "Bars span the 10th to 90th percentile of the rounds. Weights and data are random, and a "
        "decode step of one layer includes its weights and the host's launches.",
        condition=lambda study: bool(study.kernel_cases()),
        reason="has no section 'kernels'",
        draw="kvquant.analysis.figures.kernels:draw",
        table="kernels",
    ),
    Figure(
        name="capacity",
        section=Section.ACCURACY_AGAINST_COST,
        label="what fits in memory",
        caption="Tokens that fit in a budget of memory on models of random weights. Held at once: "
        "prompts of the length given are prefilled beside those before until memory ends, and the "
        "last is shortened. Longest prompt: a single one, prefilled in calls of "
        f"{CONTEXT_CHUNK:,} tokens. Upright lines are the formula's value, which divides the "
        "memory without the weights by the cache's bytes per token and knows no activations. The "
        "number beside a marker is the multiple of the 16-bit cache that holds most.",
        condition=_searches,
        reason="has no cases of whole jobs that search what fits",
        draw="kvquant.analysis.figures.capacity:draw",
        table="jobs",
    ),
    Figure(
        name="energy",
        section=Section.ENERGY,
        label="energy of whole jobs by part",
        caption="Energy of the GPU board in whole jobs, by its counter: of the prefill per prompt "
        "token, of decoding per answer token, and the shares of prefill, decoding and the idle "
        "board in a job, with the job's energy per prompt and answer token beside its bar. Markers "
        "are means and bars the range of trials; of one trial there is none. Where as many prompts "
        "run at once as fit, their number stands beside the name of a cache.",
        condition=_meters_jobs,
        reason="measures no energy of whole jobs",
        draw="kvquant.analysis.figures.energy:draw",
        table="jobs",
    ),
    Figure(
        name="roofline",
        section=Section.THROUGHPUT,
        label="decode attention against the device's roofline",
        caption="Decode attention of one layer: multiplications and additions per second against "
        "those per byte that has to be read and written. The slope is the rate of a device copy, "
        "timed in the same rounds, and its band the range over the cases; a kernel that only reads "
        "can exceed a copy. The level, where the records hold it, is one multiplication and "
        "addition per instruction that the GPU can issue without tensor cores. Of PyTorch's fp16 "
        "backends the fastest of each case is shown. Bars span the 10th "
        "to 90th percentile of rounds. A multiplication and its addition count as two operations; "
        "decoding of codes counts as none.",
        condition=_has_attention,
        reason="has no case of kernels that measures attention",
        draw="kvquant.analysis.figures.roofline:draw",
        table="kernels",
    ),
    Figure(
        name="lengths",
        section=Section.THROUGHPUT,
        label="speed and memory by length and number of prompts",
        caption="Prompts and their answers on a model of random weights, by the length of one "
        "prompt and by the number of prompts at once: speed of prefill, tokens per second of a "
        "decode step, and peak memory with the weights. Prompts are prefilled one after the other "
        "and their answers decoded together. The caches of a case take turns in one process, and "
        "each is decoded in its fastest way: the static 16-bit cache and ours as CUDA graphs, the "
        "growing one from Python. Points are medians, of all steps or of all trials together.",
        condition=_has_lengths,
        reason="has no cases of whole jobs with several lengths or numbers of prompts",
        draw="kvquant.analysis.figures.lengths:draw",
        table="jobs",
    ),
    Figure(
        name="ablation",
        section=Section.ABLATION,
        label="options of the headline scheme, one at a time",
        caption="Increase of perplexity over the unquantized cache where the headline scheme has "
        "another value of one option, a panel per option. Below each value stand the bits per "
        "element with everything included, of several models a line each. The filled marker, the "
        "bold value and the dotted line are the headline scheme itself. Markers are means over "
        "seeds, and bars span the seeds, each paired with the unquantized cache. Each axis of "
        "increases begins at 0 and ends where its panel needs.",
        condition=lambda study: bool(drawable(study)),
        reason="has no scheme that differs from the headline in one option alone",
        draw="kvquant.analysis.figures.ablation:draw",
    ),
)  # end of the list
FIGURES = by_name(_LIST)


def shown(study: Study) -> list[str]:
    """Returns the names of the figures that a study has."""
    return [name for name, figure in FIGURES.items() if figure.condition(study)]


def check(study: Study, name: str) -> None:
    """Refuses a figure that there is not, or that has nothing to show.

    Raises:
        UserError: Names the figures that there are, and the reason.
    """
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    if not FIGURES[name].condition(study):
        there = ", ".join(shown(study)) or "none"
        reason = FIGURES[name].reason
        raise UserError(f"figure {name}: the study {reason}; figures of this study: {there}")
