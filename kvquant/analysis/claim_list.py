"""The claims of the paper: text, definition, where each applies, and verdict code.

A claim is registered here and nowhere else: `kvquant claims` judges it, and the paper and the
report show it. No measured number is typed: bars come from here, values from the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvquant.analysis.bars import Bar
from kvquant.study.registrations import by_name

# Minimum of evidence for a verdict; below it a value is shown and no verdict is given.
MIN_SEEDS = 5
MIN_PROMPTS = 100
MIN_ROUNDS = 5
MIN_TRIALS = 5
MIN_REPEATS = 2  # trials of many timed steps
LONG_PROMPT = 65536  # tokens, of the claims about 8-bit attention
OURS_OF_JOBS = "{headline} (in a case without it the first quantized cache)"
# The end of definitions that models of random weights can speak to.
OF_KERNELS = "; where section 'throughput' has no record, prefills of section 'kernels'"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: The claim's name in code.
        text: The claim in a few words.
        quantity: What is measured, as a ratio to the baseline or a difference from it.
        baseline: What our cache is compared with.
        protocol: The workload of the definition, and how it is measured.
        bar: Where the claim begins to hold.
        least: The least evidence for a verdict, in words.
        judge: Names the verdict function ("module:attribute") of
            :class:`kvquant.analysis.study_tables.Tables`, which returns a
            :class:`kvquant.analysis.evidence.Outcome`.
        cache: Our cache. "{headline}" stands for the name of the study's headline scheme.
        applies_to: "model" where it is judged for each model of a study, whose rows alone the
            tables then hold; "study" where it needs no model.
        figures: Names of the figures behind it, to which the report links.
        pages: Names of the report's tables behind it.
        of_attention: Whether it is about 8-bit attention of prompts, so that it is judged on
            studies with a scheme that has it: the study itself, and its companions.
    """

    name: str
    text: str
    quantity: str
    baseline: str
    protocol: str
    bar: Bar
    least: str
    judge: str
    cache: str = "{headline}"
    applies_to: Literal["model", "study"] = "model"
    figures: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()
    of_attention: bool = False

    @property
    def definition(self) -> str:
        """Returns all of the definition in one sentence."""
        return (
            f"{self.quantity}: {self.cache} against {self.baseline}, {self.protocol}: {self.bar}, "
            f"from at least {self.least}"
        )


_LIST = (
    Claim(
        name="loss-grows",
        text="Loss grows as bits fall",
        quantity="increase of perplexity by each step to fewer bits",
        cache="NUQ with 1 % outliers and 4, 3 and 2 bits",
        baseline="the next wider one, and at first fp16",
        protocol="protocol of the task, paired by seed",
        bar=Bar(0.0, at_most=False, words="every step above 0"),
        least=f"{MIN_SEEDS} seeds",
        judge="kvquant.analysis.claims_of_accuracy:ordering",
        figures=("perplexity",),
        pages=("tests", "accuracy"),
    ),
    Claim(
        name="half-the-loss",
        text="Half of the loss of KVQuant's procedure at equal bits",
        quantity="ratio of perplexity losses",
        cache="for every width of NUQ the allocated codes with the most allocated bytes that are "
        "not more than its",
        baseline="NUQ with 1 % outliers",
        protocol="protocol B, paired by seed",
        bar=Bar(0.5, at_most=True, words="every ratio at most 0.5"),
        least=f"{MIN_SEEDS} seeds",
        judge="kvquant.analysis.claims_of_accuracy:half_the_loss",
        figures=("quality",),
        pages=("summary", "accuracy"),
    ),
    Claim(
        name="loss-on-7b",
        text="Under 0.1 perplexity at 3 bits",
        quantity="increase of perplexity",
        baseline="fp16",
        protocol="every perplexity task on Llama-2-7B, paired by seed",
        bar=Bar(0.1, at_most=True),
        least=f"{MIN_SEEDS} seeds",
        judge="kvquant.analysis.claims_of_accuracy:loss_on_7b",
        figures=("perplexity",),
        pages=("tests",),
    ),
    Claim(
        name="passkey-kept",
        text="Passkey retrieval kept",
        quantity="difference of the share of keys found, in points",
        baseline="fp16",
        protocol="protocol A, paired test of the prompts of every passkey task",
        bar=Bar(float("nan"), at_most=False, words="no task worse beyond the margin"),
        least=f"{MIN_PROMPTS} prompts and {MIN_SEEDS} seeds per task",
        judge="kvquant.analysis.claims_of_accuracy:passkey",
        figures=("passkey",),
        pages=("tests",),
    ),
    Claim(
        name="bits-per-element",
        text="At most 3.6 bits per element",
        quantity="bits per element",
        baseline="16 bits",
        protocol="allocated bytes over elements at 16K tokens or more, the most of all cases",
        bar=Bar(3.6, at_most=True),
        least="1 case, as bytes are counted and not sampled",
        judge="kvquant.analysis.claims_of_accuracy:bits_per_element",
        figures=("pareto",),
        pages=("jobs", "summary"),
    ),
    Claim(
        name="prefill-speed",
        text="Prefill at fp16 speed",
        quantity="ratio of prefill tokens/s",
        baseline="fp16",
        protocol="in turns on one GPU, worst workload",
        bar=Bar(0.98, at_most=False),
        least=f"{MIN_ROUNDS} rounds{OF_KERNELS}",
        judge="kvquant.analysis.claims_of_cost:prefill",
        figures=("throughput", "kernels"),
        pages=("throughput",),
    ),
    Claim(
        name="quantization-share",
        text="Quantization is cheap",
        quantity="time to quantize and pack as a share of a prefill",
        baseline="the fp16 prefill",
        protocol="in turns, worst workload",
        bar=Bar(0.15, at_most=True),
        least=f"{MIN_ROUNDS} rounds",
        judge="kvquant.analysis.claims_of_cost:quantize_share",
        pages=("throughput",),
    ),
    Claim(
        name="energy-per-token",
        text="Energy per token at equal batch falls by 45 %",
        quantity="ratio of joules per prompt and answer token",
        baseline="fp16",
        protocol="whole job with as many prompts at once in both, by the board's counter, in "
        "turns, worst workload",
        bar=Bar(0.55, at_most=True),
        least=f"{MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_cost:energy",
        figures=("pareto",),
        pages=("energy",),
    ),
    Claim(
        name="append-growth",
        text="Append cost does not grow",
        quantity="ratio of the cost of a token at 128K tokens to that at 1K",
        baseline="itself at 1K tokens",
        protocol="one layer, one token per call, packing of its block included",
        bar=Bar(1.2, at_most=True),
        least=f"{MIN_ROUNDS} rounds",
        judge="kvquant.analysis.claims_of_cost:append",
        applies_to="study",
        figures=("append",),
    ),
    Claim(
        name="prefill-over-kvquant",
        text="Three times the prefill of KVQuant's procedure",
        quantity="ratio of prefill tokens/s",
        baseline="KVQuant's procedure (one sequence at a time, growing arrays)",
        protocol="in turns on one GPU, worst workload",
        bar=Bar(3.0, at_most=False),
        least=f"{MIN_ROUNDS} rounds{OF_KERNELS}",
        judge="kvquant.analysis.claims_of_cost:over_reference",
        figures=("kernels",),
        pages=("throughput",),
    ),
    Claim(
        name="capacity",
        text="Four times the tokens in 40 GB",
        quantity="ratio of the tokens of prompts that were held at once in 40 GB",
        cache=OURS_OF_JOBS,
        baseline="the 16-bit cache of the case that holds most",
        protocol="Llama-2-7B's shape, random weights, prompts prefilled beside those before",
        bar=Bar(4.0, at_most=False),
        least="1 search of each cache",
        judge="kvquant.analysis.claims_of_jobs:capacity",
        applies_to="study",
        figures=("capacity",),
        pages=("capacity",),
    ),
    Claim(
        name="job-speed",
        text="Whole jobs 2.5 times as fast in 40 GB",
        quantity="ratio of prompt and answer tokens per second in 40 GB",
        cache=OURS_OF_JOBS,
        baseline="the fastest 16-bit cache of the case",
        protocol="Llama-2-7B's shape, random weights, as many prompts at once as fit, in turns",
        bar=Bar(2.5, at_most=False),
        least=f"{MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_jobs:speed",
        applies_to="study",
        figures=("lengths",),
        pages=("jobs",),
    ),
    Claim(
        name="job-energy",
        text="Energy of whole jobs in 40 GB falls by 45 %",
        quantity="ratio of joules per prompt and answer token in 40 GB",
        cache=OURS_OF_JOBS,
        baseline="the 16-bit cache of the case that takes least",
        protocol="Llama-2-7B's shape, random weights, as many prompts at once as fit, by the "
        "board's counter",
        bar=Bar(0.55, at_most=True),
        least=f"{MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_jobs:energy",
        applies_to="study",
        figures=("energy",),
        pages=("job-energy",),
    ),
    Claim(
        name="prefill-energy",
        text="Prefill takes no more energy",
        quantity="ratio of joules per prompt token of the prefill of whole jobs in 40 GB",
        cache=OURS_OF_JOBS,
        baseline="the 16-bit cache of the case that takes least",
        protocol="Llama-2-7B's shape, random weights, by the board's counter",
        bar=Bar(1.03, at_most=True),
        least=f"{MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_jobs:prefill_energy",
        applies_to="study",
        figures=("energy",),
        pages=("job-energy",),
    ),
    Claim(
        name="generate-speed",
        text="generate is as fast as with the fp16 cache",
        quantity="ratio of answer tokens per second through generate",
        cache=OURS_OF_JOBS,
        baseline="transformers' growing fp16 cache",
        protocol="in turns, worst case",
        bar=Bar(1.0, at_most=False),
        least=f"{MIN_REPEATS} trials of {MIN_ROUNDS} steps with each cache",
        judge="kvquant.analysis.claims_of_jobs:generate",
        applies_to="study",
        pages=("jobs",),
    ),
    Claim(
        name="attention-loss",
        text="8-bit attention of prompts loses less than an FP8 cache",
        quantity="ratio of the mean KL divergence from 16-bit attention over a 16-bit cache",
        cache="8-bit attention over a 16-bit cache",
        baseline="16-bit attention over an FP8 cache",
        protocol="protocol B, by seed, the worst perplexity task",
        bar=Bar(1.0, at_most=True),
        least=f"{MIN_SEEDS} seeds",
        judge="kvquant.analysis.claims_of_attention:divergence",
        figures=("quality",),
        pages=("accuracy",),
        of_attention=True,
    ),
    Claim(
        name="attention-speed",
        text="8-bit attention makes prefill of 64K tokens 1.15 times as fast",
        quantity="ratio of the time of a prompt until its first token",
        cache="a cache with 8-bit attention",
        baseline="the same cache with 16-bit attention",
        protocol=f"one prompt of {LONG_PROMPT:,} tokens or more, random weights, in turns, worst "
        "case",
        bar=Bar(1.15, at_most=False),
        least=f"{MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_attention:speed",
        applies_to="study",
        figures=("lengths",),
        pages=("jobs",),
        of_attention=True,
    ),
    Claim(
        name="attention-energy",
        text="8-bit attention takes a tenth less energy for prompts of 64K tokens",
        quantity="ratio of joules per prompt token",
        cache="a cache with 8-bit attention",
        baseline="the same cache with 16-bit attention",
        protocol=f"one prompt of {LONG_PROMPT:,} tokens or more, random weights, by the board's "
        "counter, worst case",
        bar=Bar(0.9, at_most=True),
        least=f"{MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_attention:energy",
        applies_to="study",
        figures=("energy",),
        pages=("job-energy",),
        of_attention=True,
    ),
)  # end of the list
CLAIMS = by_name(_LIST)
