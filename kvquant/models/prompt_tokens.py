"""Encodes prompts: BOS stands before them once, and nothing behind their text."""

from __future__ import annotations

from typing import Any


def prompt_tokens(tokenizer: Any, text: str, *, special: bool = True, **options: Any) -> list[int]:
    """Returns the token ids of a prompt that ends where its text does.

    Some tokenizers, such as those that were saved after fine-tuning with `add_eos_token`, end every
    text with EOS. A model would answer behind the end of the text, so these tokens are left out. A
    text that begins with BOS, such as a chat that was rendered before, gets no second one.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The prompt.
        special: Whether to add the special tokens that the tokenizer puts before texts (BOS).
        options: Further options of the tokenizer.
    """
    begin = getattr(tokenizer, "bos_token", None)
    special = special and not (begin and text.startswith(begin))
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False, **options).input_ids)
    return ids[: len(ids) - _tokens_behind(tokenizer)] if special else ids


def _tokens_behind(tokenizer: Any) -> int:
    """Returns how many special tokens a tokenizer adds behind a text."""
    plain, whole = (
        list(tokenizer("a", add_special_tokens=special, verbose=False).input_ids)
        for special in (False, True)
    )
    for start in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[start : start + len(plain)] == plain:
            return len(whole) - len(plain) - start
    return 0
