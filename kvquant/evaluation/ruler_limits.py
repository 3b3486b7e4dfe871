"""Ends for lm-eval's loops that shrink or grow a sample until it fits, which may be never."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any


class TokenCounter:
    """Stands in for the tokenizer: lm-eval only asks how many tokens a text has.

    Some of its generators shrink a text until it fits, for ever if even the smallest does not, and
    catch every exception meanwhile. After far more questions than a sample can need, every text
    fits every length (:class:`Length`), which ends each of these loops, and `gave_up` says that
    the samples are void.
    """

    def __init__(self, count_tokens: Callable[[str], int], overhead: int, limit: int) -> None:
        self._count_tokens = count_tokens
        self._overhead = overhead
        self._left = limit
        self.gave_up = False

    def measure(self, text: str) -> int:
        """Tokens of a text with the overhead."""
        return self._count_tokens(text) + self._overhead

    def tick(self) -> None:
        """Counts one question or failure."""
        self._left -= 1
        self.gave_up = self.gave_up or self._left < 0

    def __call__(self, text: str) -> Any:
        """Counts one question and answers it as a tokenizer does."""
        self.tick()
        length = 0 if self.gave_up else self.measure(text)
        return SimpleNamespace(input_ids=range(length))


class Length(int):
    """A sample's longest length: as the number, until its counter has given up.

    Then it is neither less nor more than anything, so that whatever is compared with it fits: loops
    that grow a text end as well as those that shrink it, whatever else they add to its tokens.
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
    """A length that everything fits once the counter has given up."""
    found = Length(length)
    found.counter = counter
    return found


def flaw(question: str, references: Sequence[str], *, ranked: bool) -> str:
    """What is wrong with a sample that has no right answer, or several; else nothing.

    lm-eval leaves out what has no room and goes on asking for it.

    Args:
        question: The prompt.
        references: What the answer must hold.
        ranked: They are the most frequent words of their length.
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
