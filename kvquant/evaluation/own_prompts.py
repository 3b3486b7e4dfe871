"""The user's own prompts, scored by accepted answers or by the unquantized cache's answers.

Prompts come from JSON Lines files (:mod:`kvquant.fetch.prompt_rows`). They are put in one fixed
order that looks random, and each seed takes the next `samples` of them, so that seeds 0, 1, 2, ...
ask different prompts as long as there are enough. Answers are greedy.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from typing import Any

from kvquant.errors import UserError
from kvquant.evaluation.base import Source, check_length
from kvquant.evaluation.generated import Answered, Prompt, Rules, SeedPrompts
from kvquant.evaluation.longbench import as_tokens
from kvquant.evaluation.longbench_tasks import metrics_module
from kvquant.fetch.prompt_rows import demand_answers, from_lines
from kvquant.study.sample_types import own_prompts_summary
from kvquant.study.tasks import OwnPromptsTask

# Around an answer, which `exact` does not compare: after the star come curly and other quotation
# marks, the dots of an ellipsis, Spanish opening marks, and marks of East Asian texts.
MARKS = (
    " .,;:!?\"'`*\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb\u2026\u00a1\u00bf"
    "\u3002\u3001\uff0c\uff01\uff1f\uff1a\uff1b\u300c\u300d\u300e\u300f"
)
# Scripts whose words stand without blanks between them, or take endings, by their Unicode names.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def rows_of_seed(available: int, samples: int, seed: int) -> list[int]:
    """Returns the ascending rows that a seed asks: the next `samples` of a fixed shuffle.

    Args:
        available: Number of rows.
        samples: Rows per seed; 0, or as many as there are, takes all for every seed.
        seed: The seed; seeds 0, 1, 2, ... share no row until all have been asked.
    """
    if samples == 0 or samples >= available:
        return list(range(available))
    order = list(range(available))
    random.Random(f"own prompts {available}").shuffle(order)
    first = seed * samples
    return sorted(order[(first + at) % available] for at in range(samples))


def _plain(text: str) -> str:
    """Returns a text without differences of case, white space and composed accents."""
    composed = unicodedata.normalize("NFC", " ".join(text.split()))
    return unicodedata.normalize("NFC", composed.casefold())


def _in_word(text: str, at: int) -> bool:
    """Returns whether a text has a letter, an accent or a digit of a spaced script at a place."""
    if not 0 <= at < len(text):
        return False
    if unicodedata.category(text[at])[0] not in "LM" and not text[at].isdecimal():
        return False
    return not unicodedata.name(text[at], "").startswith(UNSPACED)


def contains(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if an accepted answer occurs in an answer, else 0.

    Case and white space do not matter. Letters and digits at the ends of an accepted answer must be
    the ends of a word: "4" does not occur in "14". Scripts without blanks between words have none.
    """
    text = _plain(answer)
    for reference in map(_plain, references):
        at = text.find(reference)
        while at >= 0:
            end = at + len(reference)
            begins = not (_in_word(text, at) and _in_word(text, at - 1))
            if begins and not (_in_word(text, end - 1) and _in_word(text, end)):
                return 1.0
            at = text.find(reference, at + 1)
    return 0.0


def exact(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if an answer is an accepted one, else 0.

    Case, white space, and punctuation and quotation marks around the answer do not matter.
    """
    found = _plain(answer).strip(MARKS)
    return float(any(_plain(reference).strip(MARKS) == found for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Returns the best F1 of an answer's words with an accepted one, by lm-eval's LongBench."""
    found = metrics_module().get_qa_f1_score({"answers": list(references)}, [answer])
    return float(found["qa_f1_score"])


SCORES = {"contains": contains, "exact": exact, "f1": token_f1}


def prepare_own_prompts(source: Source, spec: OwnPromptsTask, seed: int) -> SeedPrompts:
    """Returns the prompts of a seed.

    Raises:
        UserError: A prompt is too long or has no answers that the task needs (the message names its
            file and line), or the length exceeds the model's positions.
    """
    rows = from_lines(source.text("all"), f"datasets.{spec.dataset}")
    demand_answers(rows, source.task, spec.scoring)
    check_length(source, spec.length, 0)
    room = spec.length - spec.max_new_tokens
    prompts = []
    for at in rows_of_seed(len(rows), spec.samples, seed):
        row = rows[at]
        tokens = as_tokens(source.tokenizer, row.prompt, spec.chat, source.chat)
        if len(tokens) > room:
            raise UserError(
                f"tasks.{source.task}.length: {row.where}: {len(tokens)} tokens, but `length` "
                f"{spec.length} less {spec.max_new_tokens} of answer leaves {room}: raise "
                "`length`, or shorten the prompt"
            )
        references = [] if spec.scoring == "agreement" else list(row.answers)
        prompts.append(Prompt(tokens, {"row": at, "references": references}))
    return SeedPrompts(
        prompts, spec.max_new_tokens, metrics={"prompts_available": float(len(rows))}
    )


def own_prompts_rules(spec: OwnPromptsTask, tokenizer: Any) -> Rules:
    """Returns rules that score by accepted answers, or by the unquantized cache's answer."""
    if spec.scoring == "agreement":
        return Rules(lambda prompt, answer: 0.0, agreement=True, summary=own_prompts_summary)
    measure = SCORES[spec.scoring]
    return Rules(
        lambda prompt, answer: measure(answer, prompt.record["references"]),
        summary=own_prompts_summary,
    )


OWN_PROMPTS = Answered(prepare_own_prompts, own_prompts_rules)
