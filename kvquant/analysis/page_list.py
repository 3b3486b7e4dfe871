"""The tables that the report shows as HTML pages: source, place, caption and columns of each.

A page is registered here and nowhere else. The workflow reads this list, so it imports neither
torch nor pandas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvquant.analysis.ablation import ablations
from kvquant.analysis.sections import Section
from kvquant.errors import UserError, unknown
from kvquant.study.config import Study
from kvquant.study.jobs import CONTEXT_CHUNK, SEARCHED
from kvquant.study.tasks import SUITES


@dataclass(frozen=True)
class Page:
    """A page of the report.

    Attributes:
        source: The collected table, or "claims" or "ablation", which follow from several.
        section: Where the report shows it.
        label: What it shows, in a few words.
        caption: What a row is and how to read it, in plain text.
        heads: The head of each column that the page shows, in order; other columns are in the
            collected table alone.
        condition: Whether a study has this page.
        reason: Why a study has not; follows the words "the study".
        joules: Columns of joules per token that get grams of CO2e beside them, each with what the
            heads of its grams begin with.
        measured: The columns in one of which a row must have a value; empty for all rows.
    """

    source: str
    section: Section
    label: str
    caption: str
    heads: dict[str, str]
    condition: Callable[[Study], bool] = lambda study: True
    reason: str = ""
    joules: Mapping[str, str] = field(default_factory=dict)
    measured: tuple[str, ...] = ()


_TIMED = {"device": "device", "model": "model", "workload": "workload", "scheme": "scheme"}
_TIMED |= {"rep": "repetition"}


def _has_jobs(study: Study) -> bool:
    """Returns whether a study measures whole jobs."""
    return study.jobs is not None


_JOB = {"device": "device", "case": "case", "gpus": "GPUs", "scheme": "cache"}
PAGES = {
    "claims": Page(
        "claims",
        Section.CLAIMS,
        "claims",
        "Each claim with its verdict, the measured value with its interval and what that is, on "
        "how much evidence, and how it is defined. The verdict is 'not enough evidence' where too "
        "little was measured or where the interval holds the bar. Of a claim with several parts "
        "the value is that of the part that is nearest to missing the bar.",
        {
            **{"claim": "claim", "model": "model", "verdict": "verdict", "number": "value"},
            **{"ends": "interval", "amount": "n", "bar": "bar", "quantity": "quantity"},
            **{"cache": "cache", "baseline": "baseline", "where": "workload"},
            **{"protocol": "protocol", "measured": "all that was measured"},
            "definition": "definition",
        },
    ),
    "summary": Page(
        "pareto",
        Section.ACCURACY_AGAINST_COST,
        "all axes",
        "A row per model and scheme: bits per element with everything included, perplexity and KL "
        "divergence, of the task that is named; means over all tasks of each other "
        "suite; differences to the unquantized cache; and speed and energy over the unquantized "
        "cache on the workload that is named (energy where counters measured it). A scheme that "
        "was not measured on each of those tasks has a dash. A scheme is beaten where another is "
        "at least as good on every axis on which it was measured, and better on one; without bits "
        "it is not judged.",
        {
            "model": "model",
            "scheme": "scheme",
            "quality_task": "task of bits and perplexity",
            "bits_per_element": "bits per element",
            **{
                column: head
                for suite, known in SUITES.items()
                for column, head in (
                    (suite, known.label),
                    (f"{suite}_change", "difference"),
                )
            },
            "kl": "KL divergence, nats",
            "timed_on": "timed on",
            "prefill_workload": "timed workload",
            "prefill_ratio": "prefill speed",
            "decode_ratio": "decode speed",
            "quantize_share": "quantizing, share of prefill",
            "metered_on": "metered on",
            "energy_workload": "metered workload",
            "energy_ratio": "energy per token",
            "sinks": "16-bit tokens, first",
            "residual": "16-bit tokens, latest",
            "dominated": "beaten",
        },
    ),
    "tests": Page(
        "tests",
        Section.STATISTICS,
        "paired tests",
        "Every comparison with the unquantized cache. The difference, its 95 % interval and p are "
        "of pairs of prompts or windows, p after Holm's correction within the family; the verdict "
        "weighs them against the margin of equivalence. Behind it the same of pairs of seeds.",
        {
            "model": "model",
            "task": "task",
            "scheme": "scheme",
            "verdict": "verdict",
            "baseline_mean": "16-bit cache",
            "mean": "scheme's mean",
            "sample_difference": "difference",
            "sample_ci_low": "from",
            "sample_ci_high": "to",
            "margin": "margin",
            "won": "won",
            "lost": "lost",
            "sample_pairs": "of pairs",
            "unit": "a pair is a",
            "p_sample_holm": "p",
            "family_size": "family size",
            "pairs": "seeds",
            "difference": "difference, seeds",
            "ci_low": "from, seeds",
            "ci_high": "to, seeds",
            "p_holm": "p, seeds",
            "effect_size": "Cohen's d, seeds",
            "note": "note",
        },
    ),
    "accuracy": Page(
        "eval",
        Section.ACCURACY_BY_TASK,
        "every seed",
        "Every result of an evaluation: one seed of one task. The KL divergence is that of the "
        "next token's distribution from the unquantized cache's, as mean and percentiles over all "
        "tokens of the seed. Top-1 agreement is the share of tokens at which the most probable "
        "next token is the same.",
        {
            "model": "model",
            "task": "task",
            "scheme": "scheme",
            "seed": "seed",
            "value": "value",
            "metric": "metric",
            "protocol": "protocol",
            "kl": "KL divergence, nats",
            "kl_p99": "KL, 99th percentile",
            "kl_p999": "KL, 99.9th percentile",
            "top1_agreement": "top-1 agreement",
            "bits_per_element": "bits per element",
            "samples": "samples",
            "tokens": "tokens",
            "rows_available": "rows in the set",
        },
    ),
    "throughput": Page(
        "perf",
        Section.THROUGHPUT,
        "every job",
        "Every throughput job: a scheme and the unquantized cache in turns in one process. Speeds "
        "are over the unquantized cache: above 1 is faster.",
        {
            **_TIMED,
            "scheme_status": "status",
            "prefill_ratio": "prefill speed",
            "decode_ratio": "decode speed",
            "quantize_share": "quantizing, share of prefill",
            "scheme_prefill_tokens_per_s": "prefill, tokens/s",
            "base_prefill_tokens_per_s": "unquantized, tokens/s",
            "scheme_rounds": "rounds",
        },
    ),
    "energy": Page(
        "energy",
        Section.ENERGY,
        "every job",
        "Every energy job. A ratio below 1 is less energy than the unquantized cache takes. No "
        "claim rests on a source that says 'estimated'.",
        {
            **_TIMED,
            "source": "source",
            "energy_ratio": "energy per token, ratio",
            "scheme_joules_per_token": "J per token",
            "base_joules_per_token": "unquantized, J per token",
            "scheme_trials": "trials",
        },
        joules={"scheme_joules_per_token": "", "base_joules_per_token": "unquantized, "},
    ),
    "jobs": Page(
        "jobs",
        Section.THROUGHPUT,
        "whole jobs",
        "A row per cache of each case of whole jobs, on models of random weights: prompts are "
        "prefilled one after the other and their answers decoded together. A case without a given "
        "number of prompts runs as many at once as fit in its memory. The caches of a case take "
        "turns, and each is decoded in its fastest way unless the case names generate. On several "
        "GPUs the layers are spread evenly, no CUDA graph is used, and peak memory is summed.",
        {
            **_JOB,
            "status": "status",
            "decoder": "decoded by",
            "batch_size": "prompts at once",
            "prefill_tokens_per_s": "prefill, tokens/s",
            "step_ms_median": "decode step, ms",
            "step_ms_p10": "10th percentile, ms",
            "step_ms_p90": "90th percentile, ms",
            "decode_tokens_per_s": "answer, tokens/s",
            "job_tokens_per_s": "whole job, tokens/s",
            "job_tokens_per_s_low": "slowest trial",
            "job_tokens_per_s_high": "fastest trial",
            "peak_gb": "peak memory, GB",
            "bits_per_element": "bits per element",
            "trials": "trials",
        },
        condition=_has_jobs,
        reason="has no section 'jobs'",
    ),
    "capacity": Page(
        "jobs",
        Section.ACCURACY_AGAINST_COST,
        "what fits in memory",
        "A row per cache of each case that searched what fits: prompts are prefilled beside those "
        "before until memory ends, and the last is shortened. The longest prompt is a single one "
        f"prefilled in calls of {CONTEXT_CHUNK:,} tokens. The formula divides the memory without "
        "the weights by the cache's bytes per token; it knows no activations. Memory and weights "
        "are those of all GPUs of a case.",
        {
            **_JOB,
            "capacity_tokens": "tokens held",
            "context_tokens": "longest prompt",
            "formula_tokens": "by formula",
            "memory_gb": "memory, GB",
            "weights_gb": "weights, GB",
            "bits_per_element": "bits per element",
            "emulated": "emulated on a larger GPU",
        },
        condition=_has_jobs,
        reason="has no section 'jobs'",
        measured=SEARCHED,
    ),
    "job-energy": Page(
        "jobs",
        Section.ENERGY,
        "whole jobs",
        "A row per cache of each case of whole jobs whose energy was measured: energy of the GPU "
        "boards, of the prefill per prompt token, of decoding per answer token, and of the job per "
        "prompt and answer token. Above idle leaves out what the idle board draws. Counter over "
        "power is the energy by the counter over the integral of sampled power.",
        {
            **_JOB,
            "batch_size": "prompts at once",
            "joules_per_prompt_token": "J per prompt token",
            "joules_per_answer_token": "J per answer token",
            "joules_per_token": "J per token",
            "joules_per_token_low": "lowest trial",
            "joules_per_token_high": "highest trial",
            "joules_per_token_above_idle": "J per token above idle",
            "counter_over_power": "counter over power",
            "trials": "trials",
            "source": "source",
        },
        condition=_has_jobs,
        reason="has no section 'jobs'",
        joules={"joules_per_token": ""},
        measured=("joules_per_token",),
    ),
    "ablation": Page(
        "ablation",
        Section.ABLATION,
        "one option at a time",
        "The headline scheme and schemes that differ from it in one option alone, a row per value "
        "of each such option. Bits per element, the metric, its change against the unquantized "
        "cache and the KL divergence of the next token are of the task that is named, means over "
        "seeds. Kernels, where they were timed by that scheme, run on random data: pack is the "
        "rate of quantizing and packing over a copy's, and attention is the time of the fastest "
        "16-bit decode attention over ours.",
        {
            "option": "option",
            "value_of_option": "set to",
            "headline": "the headline's",
            "model": "model",
            "scheme": "scheme",
            "task": "task",
            "bits": "bits per element",
            "metric": "metric",
            "value": "value",
            "change": "change",
            "kl": "KL divergence, nats",
            "size": "kernels of",
            "timed_on": "timed on",
            "pack_share": "pack, share of a copy",
            "attention_ratio": "attention, 16-bit over ours",
        },
        condition=lambda study: bool(ablations(study)),
        reason="has no scheme that differs from the headline in one option alone",
    ),
}


def shown(study: Study) -> list[str]:
    """Returns the names of the pages that a study has."""
    return [name for name, page in PAGES.items() if page.condition(study)]


def check(study: Study, name: str) -> None:
    """Refuses a page that there is not, or that the study has nothing to show in.

    Raises:
        UserError: Names the pages that there are, or the reason.
    """
    if name not in PAGES:
        raise unknown("table", name, PAGES)
    if name not in shown(study):
        raise UserError(f"--out: {name}: the study {PAGES[name].reason}")
