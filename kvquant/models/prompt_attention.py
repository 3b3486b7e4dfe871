"""8-bit attention of prompts, as an implementation of attention of transformers.

Importing this module registers it under :data:`NAME`, so that any model of transformers can be
loaded with `attn_implementation="kvquant_8bit"`. :func:`kvquant.load` leaves a model its own
implementation and chooses call by call: a cache says whether its prompts attend in 8 bits
(:func:`choose`). Calls with few new columns are left to 16-bit attention.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvquant.errors import UserError
from kvquant.kernels.prompt_attention import MIN_COLUMNS, attend
from kvquant.models.layer_kinds import LayerKinds
from kvquant.models.no_gradient import without_gradient
from kvquant.models.window_mask import read_window_mask, window_mask
from kvquant.study.scheme_kinds import PromptAttention, Scheme, no_prompt_attention

NAME = "kvquant_8bit"
USUAL = "sdpa"  # the 16-bit attention in its place
_SDPA = ALL_ATTENTION_FUNCTIONS[USUAL]  # where an implementation has no entry (eager)

# Attribute of a decoder during calls in 8 bits, if it has another implementation: _InEightBits.
_OWN = "kvquant_own_attention"
_LOCK = threading.Lock()  # of these attributes
_CALL = threading.local()  # `chosen`: configuration and implementation of a thread's latest call
# What implementations of attention are asked for by name, and this one does not have.
_LACKING = {
    "softcap": "caps of scores",
    "s_aux": "attention sinks",
    "position_bias": "biases of scores",
    "output_attentions": "attention weights to give",
}
_INSTEAD = "use 16-bit attention (prompt_attention: 16-bit; attn_implementation: {})"
_EITHER = f"{USUAL} or eager"
NO_GRADIENT = (
    "gradients: 8-bit attention of prompts has none; train with 16-bit attention "
    "(prompt_attention: 16-bit)"
)


def _refused(field: str, what: str, instead: str = _EITHER) -> UserError:
    told = _INSTEAD.format(instead)
    return UserError(f"{field}: 8-bit attention of prompts has no {what}; {told}")


def refuse_model(kinds: LayerKinds, config: Any) -> None:
    """Refuses a model whose prompts cannot attend in 8 bits, before its first call.

    Args:
        kinds: The kinds of its layers.
        config: Its configuration.

    Raises:
        UserError: It caps its scores, has attention sinks, or no attention is causal.
    """
    if kinds.soft_cap is not None:
        raise _refused(
            f"model: attn_logit_softcapping: {kinds.soft_cap}", _LACKING["softcap"], "eager"
        )
    if kinds.sinks:
        raise _refused("model: the learned parameter 'sinks'", _LACKING["s_aux"], "eager")
    if not getattr(config, "is_causal", True):
        raise _refused("model: is_causal: false", "attention to later tokens")


def _refuse_own_attention(config: Any) -> None:
    """Refuses a model whose layers attend by themselves, whatever implementation it is loaded with.

    Such a layer would take the mask of another implementation for one of its own, and where there
    is none, see later tokens. Implementations are looked up in the file of a model's layers.

    Args:
        config: The configuration that a mask is made for; None: unknown.

    Raises:
        UserError: No layer asks for an implementation of attention.
    """
    if config is None or "text_config" in getattr(config, "sub_configs", ()):
        return  # a model of several, whose layers are in other files
    names = (kind.__module__ for kind in type(config).__mro__)
    name = next((name for name in names if ".configuration_" in name), None)
    layers = (
        None if name is None else sys.modules.get(name.replace(".configuration_", ".modeling_"))
    )
    if layers is not None and not hasattr(layers, "ALL_ATTENTION_FUNCTIONS"):
        raise UserError(
            f"attn_implementation: {NAME}: layers of model_type '{config.model_type}' attend by "
            "themselves and take no other implementation; load the model with eager"
        )


def with_prompt_attention(
    scheme: Scheme, asked: PromptAttention | None, model: Any = None
) -> Scheme:
    """Returns a scheme whose option `prompt_attention` is what is asked for.

    Args:
        scheme: The scheme.
        asked: The option; None: that of the scheme.
        model: The model, or what it is loaded from. One that was loaded with
            `attn_implementation="kvquant_8bit"` asks for 8 bits where nothing else does.

    Raises:
        UserError: It is neither, or the kind of scheme has no such option.
    """
    if asked is None:
        own = getattr(getattr(model, "config", None), "_attn_implementation", None)
        asked = "8-bit" if own == NAME else scheme.prompt_attention
    if asked not in get_args(PromptAttention):
        raise UserError(f"prompt_attention: {asked!r} is neither '16-bit' nor '8-bit'")
    if asked == scheme.prompt_attention:
        return scheme
    if not scheme.registration.prompt_attention:
        raise UserError(f"prompt_attention: {no_prompt_attention(scheme.kind)}")
    return scheme.model_copy(update={"prompt_attention": asked})


def eight_bit_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> torch.Tensor | None:
    """Makes the mask of a call for :func:`eight_bit_prompt`, as transformers asks for it.

    Args:
        batch_size: Number of sequences.
        q_length: Number of new columns.
        kv_length: Number of columns of keys.
        q_offset: Index of the first new column; a tensor for transformers' static caches.
        kv_offset: Index of the first column of keys.
        mask_function: Says whether a query sees a key.
        attention_mask: bool `[batch_size, columns]`, which columns are tokens; None: all.
        local_size: Length of a sliding window or of a chunk of attention; None: there is none.
        allow_is_causal_skip: Whether the mask is causal and nothing else but for padding.
        others: What other implementations need.

    Returns:
        That of 16-bit attention for few columns. Else None where all columns are tokens; bool
        `[batch_size, kv_length]`, which of them are; or where a sliding window is shorter than
        `kv_length`, what :func:`window_mask` makes.

    Raises:
        UserError: The mask is not causal, or hides more than padding and columns before a sliding
            window; or the model's layers attend by themselves.
    """
    config = others.get("config")
    _refuse_own_attention(config)
    chosen = _chosen(config)
    if q_length < MIN_COLUMNS or chosen != NAME:
        usual: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[_usual(chosen)](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **others,
        )
        return usual
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise UserError(
            "past_key_values: a static cache also gives columns that nothing was written to, which "
            "8-bit attention of prompts does not tell apart; use a dynamic cache, or "
            + _INSTEAD.format(_EITHER)
        )
    window = local_size if local_size is not None and kv_length > local_size else None
    plain = mask_function is causal_mask_function or local_size is not None
    if window:  # 0: a mask that transformers makes and no layer uses (Qwen2-MoE)
        plain = _slides(mask_function, window)
    if not (allow_is_causal_skip and plain):
        what = "masks other than causal ones with padding and sliding windows"
        if attention_mask is None:  # transformers looks for several sequences per row then
            what += " (a compiled model without a cache needs attention_mask)"
        raise _refused("attention_mask", what)
    valid = None
    if attention_mask is not None:
        # The mask may be longer than what a sliding window keeps, and shorter than a call's keys.
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if valid.shape[1] != kv_length:
            raise UserError(
                f"attention_mask: has {attention_mask.shape[1]} columns, the keys "
                f"{kv_offset + kv_length}; give [batch_size, all columns]"
            )
    if window is not None:
        shape, device = (batch_size, kv_length), others.get("device")
        if valid is None:
            valid = torch.ones(shape, dtype=torch.bool, device=device)
        return window_mask(valid, window)
    return None if valid is None or bool(valid.all()) else valid


def _usual(chosen: str) -> str:
    """Returns the implementation of calls that are not in 8 bits."""
    return USUAL if chosen == NAME else chosen


def _slides(mask_function: Any, window: int) -> bool:
    """Returns whether a local mask is that of a sliding window, not one of chunks or both ways."""
    zero = torch.zeros((), dtype=torch.long)
    pairs = ((window, 1, True), (window, 0, False), (window, window + 1, False))
    try:
        return all(
            bool(mask_function(zero, zero, zero + query, zero + key)) is seen
            for query, key, seen in pairs
        )
    except (RuntimeError, IndexError):  # it reads tensors of another device, or of other sizes
        return False


def eight_bit_prompt(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention in 8 bits where a call has many new columns, else in 16 bits.

    Args:
        module: The attention module.
        query: `[batch_size, num_heads, q_len, head_dim]`, after RoPE.
        key: `[batch_size, num_kv_heads, kv_len, head_dim]`, after RoPE.
        value: The same shape.
        attention_mask: What :func:`eight_bit_mask` made.
        dropout: Probability of dropping a weight.
        scaling: Factor of the scores; None: `head_dim ** -0.5`.
        sliding_window: Number of columns that a query sees at most, its own included.
        is_causal: Whether queries see earlier keys alone; None: as the module says.
        others: Options of other implementations.

    Returns:
        `[batch_size, q_len, num_heads, head_dim]`, and no weights.

    Raises:
        UserError: The call asks for what 8-bit attention does not have.
    """
    chosen = _chosen(getattr(module, "config", None))
    for name, what in _LACKING.items():
        if others.get(name) is not None and others[name] is not False:  # sdpa has none either
            raise _refused(name, what, "eager")
    q_len, dim = query.shape[2], query.shape[3]
    if q_len < MIN_COLUMNS or chosen != NAME:
        usual: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS.get(_usual(chosen), _SDPA)(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            **others,
        )
        return usual
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise _refused("is_causal: false", "attention to later tokens")
    if dropout:
        raise UserError(
            f"attention_dropout: {dropout}: 8-bit attention of prompts applies none; call "
            "model.eval(), or set it to 0 in the model's configuration"
        )
    if value.shape != key.shape:
        raise _refused("model: head_dim", f"values of {value.shape[3]} channels for keys of {dim}")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise _refused("attention_mask", f"masks of {attention_mask.ndim} dimensions")
    factor = dim**-0.5 if scaling is None else scaling
    return _attend(query, key, value, factor, attention_mask, sliding_window), None


@torch.compiler.disable(reason="masks are read, kernels chosen and launched on the host")
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """Calls :func:`attend` on the tensors' own device and refuses gradients."""
    if valid is not None and valid.dtype is torch.int32:
        length, valid = read_window_mask(valid)
        window = length if window is None else window
    if window is not None and key.shape[2] <= window:
        window = None
    with torch.no_grad(), torch.cuda.device_of(query):
        out = attend(query, key, value, scaling=scaling, valid=valid, window=window)
    return without_gradient(out, query, key, value, why=NO_GRADIENT)


@dataclass
class _InEightBits:
    """A decoder during calls in 8 bits, whose configuration names :data:`NAME` for all threads.

    Attributes:
        own: The implementation that it has otherwise.
        threads: Those whose calls attend in 8 bits.
    """

    own: str
    threads: set[int] = field(default_factory=set)


def choose(decoder: Any, cache: Any, new_len: int) -> None:
    """Lets a decoder use the attention that a cache asks for, in the call that begins.

    :func:`restore` undoes it. A cache that asks for nothing leaves the decoder its own attention,
    and so do calls with few new columns. Calls of several threads over one model do not disturb
    each other: each thread's own choice is found by :func:`_chosen`.

    Args:
        decoder: The decoder, with `config`.
        cache: Its cache, with `prompt_attention` if it was made by a :class:`QuantizedModel`.
        new_len: Number of new columns.
    """
    restore(decoder)  # where an earlier call ended early
    asked = getattr(cache, "prompt_attention", None)
    config = decoder.config
    with _LOCK:
        shared: _InEightBits | None = decoder.__dict__.get(_OWN)
        wanted = own = config._attn_implementation if shared is None else shared.own
        if asked == "8-bit" and new_len >= MIN_COLUMNS:
            wanted = NAME
        elif asked is not None and own == NAME:
            wanted = USUAL
        if own != NAME and wanted == NAME:
            shared = shared or _InEightBits(own)
            shared.threads.add(threading.get_ident())
            setattr(decoder, _OWN, shared)
            config._attn_implementation = NAME
    _CALL.chosen = config, wanted


def restore(decoder: Any, *, every: bool = False) -> None:
    """Gives a decoder the attention back that it had before :func:`choose`.

    Args:
        decoder: The decoder.
        every: Whether calls of other threads have ended as well.
    """
    _CALL.chosen = None
    with _LOCK:
        shared: _InEightBits | None = decoder.__dict__.get(_OWN)
        if shared is None:
            return
        running = {thread.ident for thread in threading.enumerate()}  # others ended early
        shared.threads &= running - {threading.get_ident()}
        if every or not shared.threads:
            delattr(decoder, _OWN)
            decoder.config._attn_implementation = shared.own


def _chosen(config: Any) -> str:
    """Returns the implementation that this thread's call over a model is to use."""
    chosen = getattr(_CALL, "chosen", None)
    return NAME if chosen is None or chosen[0] is not config else str(chosen[1])


AttentionInterface.register(NAME, eight_bit_prompt)
AttentionMaskInterface.register(NAME, eight_bit_mask)
