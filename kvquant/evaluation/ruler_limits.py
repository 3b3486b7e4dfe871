"""Limits for lm-eval's loops that resize a sample until it fits, which may never happen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any


class TokenCounter:
    """Replaces the tokenizer, of which lm-eval only asks how many tokens a text has.

    Some of lm-eval's generators shrink a text until it fits, for ever if even the smallest does
    not fit, and catch every exception meanwhile. After far more queries than a sample can need, the
    counter gives up. Every text then fits every length (:class:`Length`), which ends the loop, and
    `gave_up` means that the samples are invalid.

    Args:
        count_tokens: Returns the number of tokens of a text.
        overhead: Number of tokens added to each count.
        limit: Number of queries after which the counter gives up.
    """

    def __init__(self, count_tokens: Callable[[str], int], overhead: int, limit: int) -> None:
        self._count_tokens = count_tokens
        self._overhead = overhead
        self._left = limit
        self.gave_up = False

    def measure(self, text: str) -> int:
        """Returns the number of tokens of a text plus the overhead."""
        return self._count_tokens(text) + self._overhead

    def tick(self) -> None:
        """Counts one query or failure."""
        self._left -= 1
        self.gave_up = self.gave_up or self._left < 0

    def __call__(self, text: str) -> Any:
        """Counts one query and answers it as a tokenizer does."""
        self.tick()
        length = 0 if self.gave_up else self.measure(text)
        return SimpleNamespace(input_ids=range(length))


class Length(int):
    """A sample's largest length, an ordinary number until its counter has given up.

    From then on it is neither less nor greater than any number, so that every text fits. This ends
    loops that grow a text as well as loops that shrink it, whatever they add to its tokens.
    """

    counter: TokenCounter

    def __lt__(self, other: int) -> bool:
        return not self.counter.gave_up and int(self) < other

    def __gt__(self, other: int) -> bool:
        return not self.counter.gave_up and int(self) > other

    def __le__(self, other: int) -> bool:
        return self.counter.gave_up or int(self) <= other

    def __ge__(self, other: int) -> bool:
        return self.counter.gave_up or int(self) >= other


def bounded(length: int, counter: TokenCounter) -> Length:
    """Returns a length that every text fits once the counter has given up."""
    found = Length(length)
    found.counter = counter
    return found


def flaw(question: str, references: Sequence[str], *, ranked: bool) -> str:
    """Returns why a sample has no right answer or several, or "".

    lm-eval drops parts of a sample that do not fit, but still asks for them.

    Args:
        question: The prompt.
        references: Texts that the answer must contain.
        ranked: Whether the references are the most frequent words of their length.
    """
    if not references:
        return "asks for nothing"
    for reference in references:
        if reference not in question:
            return f"lacks '{reference}', which it asks for"
    if ranked:
        often = Counter(re.findall(rf"\b[a-z]{{{len(references[0])}}}\b", question))
        least = min(often.pop(word) for word in set(references))
        if max(often.values(), default=0) >= least:
            return "has several third most frequent words"
    return ""
