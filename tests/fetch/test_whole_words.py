"""A tokenizer whose rules of merging are wrong is refused before anything is measured with it."""

from __future__ import annotations

from typing import Any

import pytest

from kvquant.errors import UserError
from kvquant.fetch.whole_words import refuse_broken_words, whole_words

WORDS = [f"{a}{b}{c}" for a in "bdgk" for b in "aeiou" for c in "lmn"]
LETTERS = [*"bdgkaeioulmn", "▁"]


def tokenizer(*, whole: bool, words: list[str] = WORDS) -> Any:
    """A tokenizer as SentencePiece's, whose merges end before the words where they are broken."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    merges: list[tuple[str, str]] = []
    for word in words:
        merges += [(word[0], word[1])]
        merges += [(word[:2], word[2]), ("▁", word)] if whole else []
    merges = list(dict.fromkeys(merges))
    vocabulary = [*LETTERS, *dict.fromkeys(w[:2] for w in words), *words, *(f"▁{w}" for w in words)]
    made = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_words_of_the_vocabulary_are_one_token_each() -> None:
    good = tokenizer(whole=True)
    assert good(" bam", add_special_tokens=False).input_ids == [good.get_vocab()["▁bam"]]
    assert whole_words(good) == (2 * len(WORDS), 2 * len(WORDS))
    refuse_broken_words(good, "model.gguf")


@pytest.mark.fault(
    "custody",
    "a GGUF file whose tokenizer a release of transformers converts wrongly",
    "the package, the release of transformers and what to install",
)
def test_words_that_fall_apart_are_refused() -> None:
    bad = tokenizer(whole=False)
    assert bad.convert_ids_to_tokens(bad("bam").input_ids) == ["ba", "m"]
    with pytest.raises(UserError, match=r"^package: of 120 words in the vocabulary of m\.gguf, "):
        refuse_broken_words(bad, "m.gguf")


def test_a_vocabulary_without_words_tells_nothing() -> None:
    refuse_broken_words(tokenizer(whole=False, words=WORDS[:5]), "m.gguf")
