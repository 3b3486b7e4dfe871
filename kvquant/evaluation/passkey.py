"""Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300): one number hidden in filler text."""

from __future__ import annotations

import random
import re
from typing import Any

from kvquant.config import PasskeyTask
from kvquant.errors import UserError
from kvquant.evaluation.base import SuiteResult
from kvquant.generation import greedy
from kvquant.models import QuantizedModel

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"
ANSWER_TOKENS = 10


def make_prompt(tokenizer: Any, length: int, depth: float, key: int) -> str:
    """A prompt of at most `length` tokens with the key at `depth` (0: start, 1: end).

    Raises:
        UserError: `length` has no room for the fixed lines.
    """
    line = f"The pass key is {key}. Remember it. {key} is the pass key."

    def build(units: int) -> str:
        before = round(units * depth)
        parts = (TASK, " ".join([FILLER] * before), line, " ".join([FILLER] * (units - before)))
        return "\n".join([*(p for p in parts if p), QUESTION])

    def tokens(units: int) -> int:
        return len(tokenizer(build(units)).input_ids)

    if tokens(0) > length:
        raise UserError(f"length: {length} tokens have no room for a passkey prompt")
    low, high = 0, max(1, length // 10)
    while low < high:  # the largest number of filler units that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle - 1)
    return build(low)


def correct(output: str, key: int) -> bool:
    """Whether the first run of digits in the output is the key."""
    found = re.search(r"\d+", output)
    return found is not None and int(found.group()) == key


def run(qm: QuantizedModel, task: PasskeyTask, seed: int, data: str | None) -> SuiteResult:
    """Evaluates one seed: `samples` prompts at jittered, evenly spread depths."""
    generator = random.Random(f"passkey-{seed}")
    cases = []
    for number in range(task.samples):
        depth = (number + generator.random()) / task.samples
        cases.append((depth, generator.randint(1, 50_000)))
    prompts = [
        qm.tokenizer(make_prompt(qm.tokenizer, task.length, depth, key)).input_ids
        for depth, key in cases
    ]
    result = greedy(qm, prompts, ANSWER_TOKENS, batch_size=task.batch_size)
    samples = []
    for number, ((depth, key), answer) in enumerate(zip(cases, result.tokens, strict=True)):
        output = qm.tokenizer.decode(answer, skip_special_tokens=True)
        samples.append(
            {
                "sample_id": f"{seed}-{number}",
                "score": 100.0 * correct(output, key),
                "depth": round(depth, 4),
                "target": str(key),
                "output": output,
                "tokens": len(prompts[number]),
            }
        )
    score = sum(float(s["score"]) for s in samples) / len(samples)
    return SuiteResult(
        protocol="A",
        metric="score",
        higher_is_better=True,
        metrics={"score": score},
        samples=samples,
        tokens=sum(len(p) for p in prompts),
        cache_bytes=result.cache_bytes,
        cache_elements=result.cache_elements,
    )
