"""Tiny models some of whose layers have a sliding window."""

from __future__ import annotations

from typing import Any

from tests.support.cache_uses import sharpen
from tests.support.models import tiny_model

WINDOW = 24
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
BASES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# The family and its options.
HYBRID: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {**ALTERNATING, "rope_parameters": BASES}),
    "gemma2": (
        "gemma2",
        {**ALTERNATING, "attn_logit_softcapping": 0.2, "final_logit_softcapping": 2.0},
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),  # all layers
    "ministral": ("ministral", ALTERNATING),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gpt_oss": ("gpt_oss", ALTERNATING),
}


def tiny_hybrid(name: str, **options: Any) -> Any:
    """A tiny model with windows, whose scores depend on positions."""
    family, own = HYBRID[name]
    model = tiny_model(family, **{**own, **options})
    sharpen(model)
    return model
