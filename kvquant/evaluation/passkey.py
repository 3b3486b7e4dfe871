"""Passkey retrieval: the prompt hides a number in repeated filler and asks for it at the end.

The format is that of Mohtashami and Jaggi (arXiv 2305.16300). The filler before and after the key
is cut by characters, the prompt is plain text to be continued, and the first generated number
counts.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from kvquant.errors import UserError
from kvquant.evaluation.base import Source, check_length, encode
from kvquant.evaluation.generated import Answered, Prompt, Rules, SeedPrompts
from kvquant.study.tasks import PasskeyTask

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FACT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
MAX_KEY = 50_000
MAX_NEW_TOKENS = 10
MAX_CHARACTERS = 1000  # characters of filler per token, of which real tokenizers have about 4
_NUMBER = re.compile(r"\d+")
_ENDED = re.compile(r"\d\D")


@dataclass(frozen=True)
class PasskeySample:
    """Holds a prompt, the key in it and the key's depth.

    Attributes:
        prompt: The whole text.
        key: The hidden number.
        depth: Fraction of the filler before the key, 0 to 1.
    """

    prompt: str
    key: int
    depth: float


def passkey_prompt(key: int, depth: float, filler: int) -> str:
    """Returns a prompt with `filler` characters of filler, a fraction `depth` before the key."""
    before = round(depth * filler)
    text = (FILLER + " ") * (filler // (len(FILLER) + 1) + 1)
    parts = [TASK, text[:before], FACT.format(key=key), text[: filler - before], QUESTION]
    return "\n".join(parts)


def make_sample(tokenizer: Any, length: int, samples: int, index: int, seed: int) -> PasskeySample:
    """Returns sample `index` of a seed: the longest prompt of at most `length` tokens.

    The depth is drawn from the index-th of `samples` equal parts of the filler.

    Raises:
        UserError: Not even the prompt without filler fits.
    """
    rng = random.Random(f"passkey {seed} {index}")
    depth = (index + rng.random()) / samples
    key = rng.randint(1, MAX_KEY)

    def tokens(filler: int) -> int:
        return len(encode(tokenizer, passkey_prompt(key, depth, filler), special=True))

    if (least := tokens(0)) > length:
        raise UserError(f"length: {length} tokens, but the prompt without filler has {least}")
    # Start near the solution, because each step of the search tokenizes the whole prompt.
    rate = max(tokens(4096) - least, 1) / 4096
    guess = int((length - least) / rate)
    low, high = max(0, guess - 64), guess + 64
    while tokens(low) > length:
        low, high = max(0, 2 * low - high), low
    while tokens(high) <= length:
        if high > MAX_CHARACTERS * length:
            raise UserError(
                f"length: {length} tokens are not reached by {high} characters: the tokenizer "
                "drops the filler"
            )
        low, high = high, 2 * high - low + 64
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return PasskeySample(passkey_prompt(key, depth, low), key, depth)


def first_number(answer: str) -> str | None:
    """Returns the first run of digits in an answer, or None."""
    found = _NUMBER.search(answer)
    return found.group() if found else None


def is_right(answer: str, key: int) -> bool:
    """Returns whether the first number of an answer is the key."""
    return first_number(answer) == str(key)


def prepare_passkey(source: Source, spec: PasskeyTask, seed: int) -> SeedPrompts:
    """Returns the prompts of a seed.

    Raises:
        UserError: The length does not fit the prompt or the model.
    """
    check_length(source, spec.length, MAX_NEW_TOKENS)
    try:
        samples = [
            make_sample(source.tokenizer, spec.length, spec.samples, index, seed)
            for index in range(spec.samples)
        ]
    except UserError as error:
        raise UserError(f"tasks.{source.task}.{error}") from None
    return SeedPrompts(
        [
            Prompt(
                encode(source.tokenizer, sample.prompt, special=True),
                {"key": sample.key, "depth": sample.depth},
            )
            for sample in samples
        ],
        MAX_NEW_TOKENS,
    )


def passkey_rules(spec: PasskeyTask, tokenizer: Any) -> Rules:
    """Returns rules that score an answer as right or wrong once its first number has ended."""

    def ended(tokens: list[int]) -> bool:
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        return _ENDED.search(text) is not None

    def score(prompt: Prompt, answer: str) -> float:
        return float(is_right(answer, prompt.record["key"]))

    return Rules(score, metric="accuracy", stop=ended)


PASSKEY = Answered(prepare_passkey, passkey_rules)
