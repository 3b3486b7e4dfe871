"""Parses the header of a GGUF file once for everything that reads it during a conversion."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def parsed_once() -> Iterator[None]:
    """Makes all who open a GGUF file share one reader, until the block ends.

    The reader turns each token and merge of the vocabulary into arrays, which takes seconds.
    transformers does so for the configuration, the weights and the tokenizer, and builds the table
    of tensor names again for every module of the model.
    """
    import gguf

    with (
        patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield
