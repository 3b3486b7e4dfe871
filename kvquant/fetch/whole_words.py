"""Checks that a converted tokenizer gives the tokens of its own vocabulary.

A GGUF header holds the vocabulary and, for some kinds, no rules of merging: transformers derives
them, and its release 5.17 does so wrongly for Gemma 3, whose words fall apart into letters. Nothing
else would tell: the model runs on such a text, and its perplexity is that of another text.
"""

from __future__ import annotations

from typing import Any

from kvquant.errors import UserError

MIN_LETTERS = 3
MIN_WORDS, MAX_WORDS = 20, 1000  # that are tried; a vocabulary of fewer words tells nothing
MAX_DECODED = 1 << 14  # tokens among which they are looked for
LEAST_SHARE = 0.9  # a right tokenizer gives nearly all of them


def whole_words(tokenizer: Any) -> tuple[int, int]:
    """Counts words of the vocabulary that are one token, of those that are tried.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        (words that become the token that they are, words tried), at most `MAX_WORDS` that lie
        evenly in the vocabulary.
    """
    numbers = sorted(tokenizer.get_vocab().values())
    numbers = numbers[:: max(1, len(numbers) // MAX_DECODED)]
    texts = ((number, tokenizer.decode([number])) for number in numbers)
    words = [
        (number, word)
        for number, text in texts
        if len(word := text.strip()) >= MIN_LETTERS and word.isascii() and word.isalpha()
    ]
    words = words[:: max(1, len(words) // MAX_WORDS)][:MAX_WORDS]
    found = 0
    for number, word in words:
        ways = (tokenizer(text, add_special_tokens=False).input_ids for text in (word, f" {word}"))
        # Some tokenizers put a mark of the text's beginning before its words.
        found += any(ids[-1:] == [number] for ids in ways)
    return found, len(words)


def refuse_broken_words(tokenizer: Any, name: str) -> None:
    """Refuses a tokenizer that splits the words of its own vocabulary.

    Args:
        tokenizer: A tokenizer of transformers.
        name: What it was made from, for the message.

    Raises:
        UserError: It does.
    """
    found, tried = whole_words(tokenizer)
    if tried >= MIN_WORDS and found < LEAST_SHARE * tried:
        import transformers

        raise UserError(
            f"package: of {tried} words in the vocabulary of {name}, transformers "
            f"{transformers.__version__} makes {tried - found} more than one token: its conversion "
            "of this tokenizer is wrong; install another release (5.18 or later)"
        )
