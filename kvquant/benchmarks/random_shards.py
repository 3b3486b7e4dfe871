"""Random weights of a model that processes share, and a stand-in for one process's part.

Each process makes its own part of every weight, where it stays: no process, GPU or host ever holds
the whole model. The numbers are not those that a single process makes, but shapes and work are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvquant.formats.head_share import HeadShare
from kvquant.models.hooks import attention_layers
from kvquant.models.prefill_quant import adapter_of
from kvquant.models.tensor_parallel import own_tensor, plan_options, share_heads


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers and torch from warning that no weights were loaded, which is meant."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def shared_llama(config: Any, dtype: torch.dtype) -> tuple[Any, HeadShare | None]:
    """Makes this process's part of a Llama with random weights, by transformers' own plan.

    Args:
        config: The configuration of the whole model.
        dtype: The dtype of the weights.

    Returns:
        The model on this process's device, and which kv heads are its own.

    Raises:
        UserError: The number of processes does not divide the kv heads, or exceeds the GPUs.
    """
    from transformers import LlamaForCausalLM

    options = plan_options(config, "auto", "auto", None)
    with _quiet():
        model: Any = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict={}, dtype=dtype, **options
        ).eval()
    attentions = attention_layers(model)
    share = share_heads(model, attentions, adapter_of(attentions[0]).family)
    generators: dict[bool, torch.Generator] = {}
    for parameter in model.parameters():
        own = own_tensor(parameter)
        split = own is not parameter
        if split not in generators:  # what every process has must be the same in all
            seed = 1 + share.rank if share is not None and split else 0
            generators[split] = torch.Generator(own.device).manual_seed(seed)
        if own.dim() > 1:
            own.normal_(0.0, config.initializer_range, generator=generators[split])
    return model, share


@torch.no_grad()
def stand_in(model: Any, dims: dict[str, int], head_dim: int) -> tuple[Any, dict[str, int]]:
    """Makes a model of one process's part alone, which talks to no other process.

    It has the same weights in the same memory, and its calls allocate what those of the part
    allocate, but its outputs mean nothing: no sums over processes are formed. It serves to search
    what fits: a process of a shared model that runs out of memory within a call would leave the
    others waiting for it.

    Args:
        model: The part of a shared Llama.
        dims: The dimensions of the whole model.
        head_dim: Channels per head.

    Returns:
        The model and its dimensions.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {name: own_tensor(parameter) for name, parameter in model.named_parameters()}
    first = "model.layers.0."
    local = dims | {
        "num_attention_heads": len(own[first + "self_attn.q_proj.weight"]) // head_dim,
        "num_key_value_heads": len(own[first + "self_attn.k_proj.weight"]) // head_dim,
        "intermediate_size": len(own[first + "mlp.gate_proj.weight"]),
        "vocab_size": len(own["model.embed_tokens.weight"]),
    }
    config = LlamaConfig(
        **local,
        head_dim=head_dim,
        max_position_embeddings=model.config.max_position_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        made: Any = LlamaForCausalLM(config).eval()
    for name, weight in own.items():
        module, _, key = name.rpartition(".")
        parameter = nn.Parameter(weight, requires_grad=False)
        setattr(made.get_submodule(module), key, parameter)
    made.model.rotary_emb = model.model.rotary_emb  # its tables are no weights
    return made, local
