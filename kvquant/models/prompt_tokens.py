"""Encodes prompts, which an answer continues, so nothing may stand behind their text."""

from __future__ import annotations

from typing import Any


def prompt_tokens(tokenizer: Any, text: str, *, special: bool = True, **options: Any) -> list[int]:
    """Returns the token ids of a prompt that ends where its text does.

    Some tokenizers, such as those that were saved after fine-tuning with `add_eos_token`, end every
    text with EOS. A model would answer behind the end of the text, so these tokens are left out.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The prompt.
        special: Whether to add the special tokens that the tokenizer puts before texts (BOS).
        options: Further options of the tokenizer.
    """
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
