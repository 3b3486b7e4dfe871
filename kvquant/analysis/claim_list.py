"""The claims of the paper: text, definition, where each applies, and verdict code.

A claim is registered here and nowhere else: `kvquant claims` judges it, and the paper and the
report show it. No number is typed: bars come from the definitions, values from the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvquant.study.registrations import by_name

# Minimum of evidence for a verdict; below it a value is shown and no verdict is given.
MIN_SEEDS = 5
MIN_PROMPTS = 100
MIN_ROUNDS = 5
MIN_TRIALS = 5
MIN_REPEATS = 2  # trials of many timed steps
# The caches of definitions about whole jobs in a budget of memory.
IN_40_GB = (
    "shape of Llama-2-7B, random weights, 40 GB: {headline} (in a case without it the first "
    "quantized cache)"
)
# The end of definitions that models of random weights can speak to.
OF_KERNELS = (
    "; where section 'throughput' has no record, prefills of section 'kernels', 10th to 90th "
    "percentile of rounds"
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: The claim's name in code.
        text: The claim in a few words.
        definition: Scheme, baseline, protocol or workload, the bar, and the least evidence.
            "{headline}" stands for the name of the study's headline scheme.
        judge: Names the verdict function ("module:attribute") of
            :class:`kvquant.analysis.study_tables.Tables`, which returns a
            :class:`kvquant.analysis.evidence.Outcome`.
        applies_to: "model" where it is judged for each model of a study, whose rows alone the
            tables then hold; "study" where it needs no model.
    """

    name: str
    text: str
    definition: str
    judge: str
    applies_to: Literal["model", "study"] = "model"


_LIST = (
    Claim(
        name="loss-grows",
        text="Loss grows as bits fall",
        definition="perplexity, protocol of the task: fp16 < 4 < 3 < 2 bits, 1 % outliers, paired "
        f"by seed: the 95 % interval of every step above 0, at least {MIN_SEEDS} seeds",
        judge="kvquant.analysis.claims_of_accuracy:ordering",
    ),
    Claim(
        name="half-the-loss",
        text="Half of the loss of KVQuant's procedure at equal bits",
        definition="perplexity, protocol B: loss of allocated codes over that of NUQ with 1 % "
        "outliers, for every width of NUQ the allocated codes with the most allocated bytes that "
        "are not more than its: the 95 % interval of every ratio, paired by seed, at most 0.5, at "
        f"least {MIN_SEEDS} seeds",
        judge="kvquant.analysis.claims_of_accuracy:half_the_loss",
    ),
    Claim(
        name="loss-on-7b",
        text="Under 0.1 perplexity at 3 bits",
        definition="{headline} against fp16 on Llama-2-7B, upper end of the 95 % interval "
        f"below 0.1 on every perplexity task, at least {MIN_SEEDS} seeds",
        judge="kvquant.analysis.claims_of_accuracy:loss_on_7b",
    ),
    Claim(
        name="passkey-kept",
        text="Passkey retrieval kept",
        definition="{headline} against fp16, protocol A, paired test of every passkey task: "
        f"not worse beyond the margin, at least {MIN_PROMPTS} prompts and {MIN_SEEDS} seeds per "
        "task",
        judge="kvquant.analysis.claims_of_accuracy:passkey",
    ),
    Claim(
        name="bits-per-element",
        text="At most 3.6 bits per element",
        definition="{headline}, allocated bytes over elements at 16K tokens or more",
        judge="kvquant.analysis.claims_of_accuracy:bits_per_element",
    ),
    Claim(
        name="prefill-speed",
        text="Prefill at fp16 speed",
        definition="{headline} over fp16, prefill tokens/s, interleaved, GPU: at least 0.98 "
        f"in every repetition of the worst workload, at least {MIN_ROUNDS} rounds{OF_KERNELS}",
        judge="kvquant.analysis.claims_of_cost:prefill",
    ),
    Claim(
        name="quantization-share",
        text="Quantization is cheap",
        definition="{headline}: quantize and pack over the fp16 prefill: at most 15 % in "
        f"every repetition of the worst workload, at least {MIN_ROUNDS} rounds",
        judge="kvquant.analysis.claims_of_cost:quantize_share",
    ),
    Claim(
        name="energy-per-token",
        text="Energy per token at equal batch falls by 45 %",
        definition="{headline} over fp16, whole job with as many prompts at once in both, measured "
        "by counters: at most 0.55 in every repetition of the worst workload, at least "
        f"{MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_cost:energy",
    ),
    Claim(
        name="append-growth",
        text="Append cost does not grow",
        definition="{headline}, one layer, one token per call: cost of a token, packing of its "
        f"block included, at 128K tokens over 1K, medians of at least {MIN_ROUNDS} rounds: at most "
        "1.2",
        judge="kvquant.analysis.claims_of_cost:append",
        applies_to="study",
    ),
    Claim(
        name="prefill-over-kvquant",
        text="Three times the prefill of KVQuant's procedure",
        definition="{headline}: prefill tokens/s over a one-sequence, growing-array reference, "
        "GPU: at least 3 in every repetition of the worst workload, at least "
        f"{MIN_ROUNDS} rounds{OF_KERNELS}",
        judge="kvquant.analysis.claims_of_cost:over_reference",
    ),
    Claim(
        name="capacity",
        text="Four times the tokens in 40 GB",
        definition=f"{IN_40_GB} over the 16-bit cache of the case that holds most: tokens of "
        "prompts that were held at once, each prefilled beside those before: at least 4",
        judge="kvquant.analysis.claims_of_jobs:capacity",
        applies_to="study",
    ),
    Claim(
        name="job-speed",
        text="Whole jobs 2.5 times as fast in 40 GB",
        definition=f"{IN_40_GB} over the fastest 16-bit cache of the case: prompt and answer "
        "tokens per second, each with as many prompts at once as fit: the worst ratio of any two "
        f"trials at least 2.5, at least {MIN_TRIALS} trials in turns",
        judge="kvquant.analysis.claims_of_jobs:speed",
        applies_to="study",
    ),
    Claim(
        name="job-energy",
        text="Energy of whole jobs in 40 GB falls by 45 %",
        definition=f"{IN_40_GB} over the 16-bit cache of the case that takes least: joules of the "
        "GPU board per prompt and answer token, by its counter, each with as many prompts at once "
        f"as fit: the worst ratio of any two trials at most 0.55, at least {MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_jobs:energy",
        applies_to="study",
    ),
    Claim(
        name="prefill-energy",
        text="Prefill takes no more energy",
        definition=f"{IN_40_GB} over the 16-bit cache of the case that takes least: joules of the "
        "GPU board per prompt token of the prefill of whole jobs, by its counter: the worst ratio "
        f"of any two trials at most 1.03, at least {MIN_TRIALS} trials",
        judge="kvquant.analysis.claims_of_jobs:prefill_energy",
        applies_to="study",
    ),
    Claim(
        name="generate-speed",
        text="generate is as fast as with the fp16 cache",
        definition="{headline} (in a case without it the first quantized cache) over transformers' "
        "growing fp16 cache, answer tokens per second through generate: the worst ratio of any two "
        f"trials of the worst case at least 1, at least {MIN_REPEATS} trials of {MIN_ROUNDS} steps "
        "with each cache",
        judge="kvquant.analysis.claims_of_jobs:generate",
        applies_to="study",
    ),
)  # end of the list
CLAIMS = by_name(_LIST)
