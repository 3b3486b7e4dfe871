"""Tells how many bytes a model's weights take once they are loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from kvquant.diagnosis.model_facts import ModelFacts
from kvquant.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def weight_dtype(facts: ModelFacts, asked: str) -> str:
    """Returns the name of the dtype of weights on a GPU.

    Args:
        facts: The model.
        asked: A name of :data:`DTYPES`, or "auto" for what the library chooses there.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if facts.dtype is torch.bfloat16 else "float16"


def weight_bytes(facts: ModelFacts, dtype: str) -> int:
    """Returns the bytes of a model's weights.

    Those of unquantized weights follow from the configuration and the dtype. Those of quantized
    ones are what the folder's safetensors files hold.

    Args:
        facts: The model.
        dtype: A name of :data:`DTYPES`.

    Raises:
        UserError: Weights are quantized, and no folder of files says how large they are.
    """
    if facts.stored is None:
        return facts.parameters * DTYPES[dtype].itemsize
    files = sorted(Path(facts.name).glob("*.safetensors"))
    if not files:
        raise UserError(
            f"--weights: the weights of '{facts.name}' are quantized ({facts.stored}), and only "
            "its files say how large they are; name a folder with them, or give --weights 5GB"
        )
    return sum(map(_data_bytes, files))


def _data_bytes(file: Path) -> int:
    """Returns the bytes of a safetensors file without its header."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return max(0, file.stat().st_size - 8 - header)
