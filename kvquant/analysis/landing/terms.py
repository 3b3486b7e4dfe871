"""The terms that a reader of the report needs, with what each means in the study at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvquant.analysis.companion_tables import measures_attention
from kvquant.analysis.evidence import NOT_ENOUGH, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED
from kvquant.analysis.labels import labels_of
from kvquant.study.config import Study
from kvquant.study.scheme_kinds import MIN_COLUMNS

PROTOCOLS = {
    "A": "the prompt attends to its own keys and values in full precision, and later tokens read "
    "the quantized cache, which is what serving does",
    "B": "every token attends to quantized keys and values, the prompt's own included, as in "
    "KVQuant's perplexities",
}
VERDICTS = {
    SUPPORTED: "the measured interval or the worst repetition meets the bar of the claim's "
    "definition, on at least the evidence that it asks for",
    NOT_SUPPORTED: "it misses the bar",
    NOT_ENOUGH: "too little was measured, or the interval holds the bar",
    NOT_MEASURED: "this study has no such measurement; the reason stands in place of a value, and "
    "nothing is estimated",
}
# Verdicts of paired tests, with the marks that stand behind scores in the paper's tables.
TESTS = {
    "identical": ("=", "no pair differs"),
    "equivalent": ("\N{ALMOST EQUAL TO}", "the interval lies within the margin"),
    "worse": ("\N{DOWNWARDS ARROW}", "a significant loss"),
    "better": ("\N{UPWARDS ARROW}", "a significant gain"),
    "worse (within margin)": ("\N{SOUTH EAST ARROW}", "a significant loss within the margin"),
    "better (within margin)": ("\N{NORTH EAST ARROW}", "a significant gain within the margin"),
    "not informative": (
        "\N{WHITE CIRCLE}",
        "the unquantized cache itself scores too low to show a loss",
    ),
    "inconclusive": ("", "none of these is shown"),
}


@dataclass(frozen=True)
class Term:
    """A term of the report.

    Attributes:
        name: The term.
        text: What it means, one or more sentences.
        items: A word and its meaning each, where the term is a list.
    """

    name: str
    text: str
    items: tuple[tuple[str, str], ...] = ()


def percent(alpha: float) -> str:
    """Returns the level of intervals, such as "95 %"."""
    return f"{100 * (1 - alpha):.3g} %"


def terms(study: Study) -> Iterator[Term]:
    """Yields the terms of a study, those that it does not use left out."""
    baseline = labels_of(study).scheme(study.baseline)
    level = percent(study.statistics.alpha)
    yield Term(
        "Baseline",
        f"The unquantized cache ({baseline}). Losses are paired with it by prompt or window of "
        "text and by seed; speeds and energies are over it, measured in turns in one process.",
    )
    yield Term(
        "Bits per element",
        "Bytes that are really allocated (codes, codebooks, scales, outliers with their indices, "
        "tokens kept in 16 bits, unused space of blocks) over the stored elements. The bits in a "
        "scheme's name are nominal.",
    )
    used = sorted({str(task.cache_protocol()) for task in study.tasks.values()} & set(PROTOCOLS))
    if used:
        several = "Each result names its protocol." if len(used) > 1 else "All tasks here use it."
        items = tuple((f"Protocol {name}", PROTOCOLS[name]) for name in used)
        yield Term("Protocols", several, items)
    if measures_attention(study):
        yield Term(
            "8-bit attention",
            f"Calls with {MIN_COLUMNS} new tokens or more, which are prompts above all, multiply "
            "queries with keys, and weights with values, in 8 bits. That is for the time of long "
            "prompts, and leaves the bytes of the cache as they are. Answers are decoded with "
            "16-bit attention, and schemes whose names do not say it have no other.",
        )
    yield Term(
        "Intervals",
        f"Square brackets hold a {level} interval over seeds, or, of timings and energies, the "
        "ends of repetitions, rounds or trials, as the claim's definition says.",
    )
    yield Term("Verdicts of claims", "", tuple(VERDICTS.items()))
    yield Term(
        "Verdicts of paired tests",
        "Each scheme is compared with the baseline on every task, with p adjusted by Holm's "
        "procedure. In the paper's tables marks stand for these words.",
        tuple((f"{word} ({mark})" if mark else word, text) for word, (mark, text) in TESTS.items()),
    )
    yield Term(
        "A dash, or \u201cnot measured\u201d",
        "There is no record of it. The explorer says of each empty cell whether the study asks for "
        "it and it is not measured yet, the study does not ask for it, or memory ran out.",
    )
    if study.job_cases() or study.kernel_cases():
        yield Term(
            "Random weights",
            "Whole jobs and kernels run on the shapes of larger models with random weights. That "
            "gives their time, memory and energy, and says nothing of accuracy.",
        )
