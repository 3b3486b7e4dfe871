"""The attention module that delegates to an `AttendingCache` and else acts as the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvquant.errors import UserError
from kvquant.kernels.masked_attention import causal_mask, masked_attention
from kvquant.models.adapters import AttentionAdapter, adapter_of_class
from kvquant.models.model_call import CACHE_NAMES, arguments, find_cache, parameters, refuse_unknown
from kvquant.models.no_gradient import without_gradient
from kvquant.models.tensor_parallel import kept_heads

# Arguments of the attention that are used, or that do not affect it.
_USED = frozenset({"hidden_states", "position_embeddings", "attention_mask", *CACHE_NAMES})
_KNOWN = _USED | {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits",
}  # fmt: skip

# Attribute with the names of the projections that the rotation of values is folded into.
FOLDED = "kvquant_folded"
# In the names of implementations of attention that cap scores and have sinks when asked to.
_COMPLETE = ("flash", "flex")


@torch.compiler.disable(reason="the cache plans on the host and changes its shapes as it grows")
def _attend(module: Any, cache: Any, *args: Any) -> torch.Tensor:
    """Calls :meth:`kvquant.cache.attending.AttendingCache.attend` outside of compiled graphs.

    In a compiled model the graph breaks here and continues afterwards. The layer's index is read
    inside this function, so that compiled code serves all layers. Kernels are launched on the
    layer's own GPU, whichever is the current one. Gradients exist only for a first call that
    attends in full precision; elsewhere they are refused.
    """
    exact = cache.protocol == "A" and not cache.get_seq_length()
    with torch.cuda.device_of(args[0]):
        output: torch.Tensor = cache.attend(module.layer_idx, *args)
    return output if exact else without_gradient(output, *args[:3])


class PrefillQuantizedAttention(nn.Module):
    """A drop-in for the self-attention of all families in :mod:`kvquant.study.model_families`.

    Keys are taken before RoPE (and after a norm of keys, as in Qwen3) by the family's adapter,
    stored by the cache, and rotated when read, so that one calibration per channel holds at every
    position.

    `PrefillQuantizedAttention(module)` changes the class of the attention module and returns it.
    Weights, their names, hooks and references stay as they are. :meth:`restore` undoes it.

    Args:
        original: The attention module.

    Attributes:
        original_class: The original class of the module.
        parameters_of_forward: Names of the parameters of its `forward`, in order.
    """

    original_class: type[nn.Module]
    parameters_of_forward: tuple[str, ...]

    def __new__(cls, original: nn.Module | None = None) -> PrefillQuantizedAttention:
        """Turns `original` into a drop-in; copying a drop-in calls this without `original`."""
        if original is None:
            return super().__new__(cls)
        if not isinstance(original, PrefillQuantizedAttention):
            _take_over(original)
        return original  # type: ignore[return-value]

    def __init__(self, original: nn.Module) -> None:
        """Does nothing, because the module is initialized already."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a projection with the rotation of values in its weights stays.

        What takes its place (an adapter) would give values that are not rotated.

        Raises:
            UserError: The projection would be replaced.
        """
        if name in self.__dict__.get(FOLDED, ()) and value is not self._modules.get(name):
            raise UserError(
                f"model: {name} has the rotation of values in its weights, so that no adapter or "
                "other module can take its place; load the model with transformers and give "
                "load_quantized_model the object, whose weights stay as they are"
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the original class, from which unpickling makes a drop-in again."""
        return _blank, (self.original_class,), self.__getstate__()

    def restore(self) -> None:
        """Restores the original class of the module."""
        self.__class__ = self.original_class  # type: ignore[assignment]
        hooked = self.__dict__.get("_old_forward")
        if hooked is not None:
            self.__dict__["_old_forward"] = type(self).forward.__get__(self)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the attention of `[batch_size, new_len, hidden_size]` over cache and call.

        Raises:
            UserError: An argument is unknown, or asks for what a quantized cache cannot give.
        """
        module: Any = self
        original = self.original_class.forward
        given = arguments(self.parameters_of_forward, args, kwargs)
        cache = find_cache(given)
        if cache is None:
            plain: tuple[torch.Tensor, torch.Tensor | None] = original(self, *args, **kwargs)
            return plain
        refuse_unknown(given, _KNOWN)
        dropout: float = getattr(module, "attention_dropout", 0.0)
        if self.training and dropout:
            raise UserError(
                "attention_dropout: not applied over a quantized cache; call model.eval(), or set "
                "it to 0 in the model's configuration"
            )
        hidden_states, rope = given["hidden_states"], given["position_embeddings"]
        adapter = adapter_of(self)
        queries, keys, values = adapter.project(
            self, hidden_states, adapter.width(rope), given.get("position_ids")
        )
        kept = kept_heads(module)
        if kept is not None:
            queries, keys, values = kept.own(queries, keys, values)
        rope = adapter.table(rope, module.head_dim)
        sink_logits = adapter.sink_logits(self)

        def full(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            /,
            *,
            valid: torch.Tensor | None = None,
            over_past: bool = False,
        ) -> torch.Tensor:
            # Looked up here, because decode steps do not need it.
            implementation = module.config._attn_implementation
            function = ALL_ATTENTION_FUNCTIONS.get(implementation, ALL_ATTENTION_FUNCTIONS["sdpa"])
            others = {name: value for name, value in given.items() if name not in _USED}
            mask = valid if over_past else given.get("attention_mask")
            cap = cache.soft_cap
            plain = cap is None and sink_logits is None
            if not plain and not any(word in implementation for word in _COMPLETE):
                if mask is None and q.shape[2] > 1:
                    mask = causal_mask(q.shape[2], q.device)
                return masked_attention(q, k, v, mask, module.scaling, cap, sink_logits)
            if cap is not None:
                others["softcap"] = cap
            if sink_logits is not None:
                others["s_aux"] = sink_logits
            window = getattr(cache.layers[module.layer_idx], "window", None)
            if window is not None:  # for implementations without a mask
                others["sliding_window"] = window
            out: torch.Tensor = function(
                module, q, k, v, mask, dropout=0.0, scaling=module.scaling, **others
            )[0]
            return out

        rest = rope, module.scaling, full, sink_logits
        output = _attend(module, cache, queries, keys, values, *rest)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return module.o_proj(output if kept is None else kept.output(output)), None


def _blank(own: type[nn.Module]) -> nn.Module:
    """Makes a drop-in without state for a module of the class `own`."""
    module = own.__new__(own)
    _take_over(module)
    return module


_CLASSES: dict[type[nn.Module], type[PrefillQuantizedAttention]] = {}


def _take_over(module: nn.Module) -> None:
    """Changes a module's class to a subclass of both its own class and the drop-in."""
    own = type(module)
    if own not in _CLASSES:
        _CLASSES[own] = type(
            f"PrefillQuantized{own.__name__}",
            (PrefillQuantizedAttention, own),
            {
                "__module__": __name__,
                "__doc__": PrefillQuantizedAttention.__doc__,
                "original_class": own,
                "parameters_of_forward": parameters(own.forward),
            },
        )
    patched = module.__dict__.get("forward")
    hooked = module.__dict__.get("_old_forward")
    if patched is not None and hooked is None:
        raise UserError(
            f"model: the forward method of a {own.__name__} was replaced ({patched!r}); load the "
            "model without what replaced it"
        )
    module.__class__ = _CLASSES[own]
    if hooked is not None:  # accelerate stores the hooked method in the instance
        module.__dict__["_old_forward"] = _CLASSES[own].forward.__get__(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class of an attention module, the original one if it is a drop-in."""
    if isinstance(module, PrefillQuantizedAttention):
        return module.original_class
    return type(module)


def adapter_of(module: nn.Module) -> AttentionAdapter:
    """Returns the adapter of an attention module, drop-in or not.

    Raises:
        UserError: The module's class belongs to no registered family.
    """
    return adapter_of_class(original_class(module).__name__)
