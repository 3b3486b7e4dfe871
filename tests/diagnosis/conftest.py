"""Configurations without weights, of models that quantized caches serve and of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 32768,
}  # fmt: skip
SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 97,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": None,
}  # fmt: skip
LINEAR = {
    **SMALL,
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
}  # fmt: skip
HYBRID = {
    **SMALL,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 100,
    "max_position_embeddings": 8192,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "7b": ("llama", LLAMA_2_7B),
    "small": ("llama", {**SMALL, "max_position_embeddings": 2048}),
    "gemma2": ("gemma2", HYBRID),
    "qwen3-next": ("qwen3_next", LINEAR),
    "starcoder2": ("starcoder2", {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "t5": ("t5", {}),
}


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of each configuration of `CONFIGS`."""
    folder = tmp_path_factory.mktemp("configs")
    for name, (family, options) in CONFIGS.items():
        AutoConfig.for_model(family, **options).save_pretrained(folder / name)
    return folder
