"""Shared fixtures: tiny models built in memory, one of each supported family."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def tiny_model(family: str = "llama", heads: int = 4, kv_heads: int = 2, **extra: Any) -> Any:
    """A random model of two layers, head_dim 16, 512 positions, fp32, on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    common = {
        "vocab_size": 97,
        "hidden_size": heads * 16,
        "head_dim": 16,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
    }
    if family == "mistral":
        common["sliding_window"] = None
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**common, **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    with torch.no_grad():  # biases start at zero and would hide a missing one
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_()
    return model


@pytest.fixture(scope="session", autouse=True)
def _own_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kernels are compiled anew, not taken from the user's cache."""
    os.environ["KVQUANT_CACHE"] = str(tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Evaluation data that is not part of the repository."""
    found = os.environ.get("KVQUANT_DATA_DIR")
    if not found or not Path(found).is_dir():
        pytest.skip("KVQUANT_DATA_DIR is not set to a folder of evaluation data")
    return Path(found)
