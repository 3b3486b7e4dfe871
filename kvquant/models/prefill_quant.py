"""Attention that leaves the work to an `AttendingCache`; with any other it is the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvquant.errors import UserError
from kvquant.models.model_call import CACHE_NAMES, arguments, find_cache, parameters, refuse_unknown
from kvquant.models.no_gradient import without_gradient

# Arguments of the attention that are used, or that say nothing about it.
_USED = frozenset({"hidden_states", "position_embeddings", "attention_mask", *CACHE_NAMES})
_KNOWN = _USED | {"position_ids", "use_cache", "output_attentions", "output_hidden_states"}


@torch.compiler.disable(reason="the cache plans on the host and changes its shapes as it grows")
def _attend(module: Any, cache: Any, *args: Any) -> torch.Tensor:
    """See :meth:`kvquant.cache.attending.AttendingCache.attend`.

    In a compiled model the graph ends here and goes on after. The layer's number is looked up in
    here, so that compiled code serves all layers. Kernels are launched on the layer's own GPU,
    whichever is the process's current one. Gradients are those of a first call that attends in full
    precision, or refused.
    """
    exact = cache.protocol == "A" and not cache.get_seq_length()
    with torch.cuda.device_of(args[0]):
        output: torch.Tensor = cache.attend(module.layer_idx, *args)
    return output if exact else without_gradient(output, *args[:3])


class PrefillQuantizedAttention(nn.Module):
    """Drop-in for the self-attention of every :class:`kvquant.study.model_families.ModelFamily`.

    Keys are taken before RoPE (and after a norm of keys, as in Qwen3), stored by the cache, and
    rotated when read, so one calibration per channel holds at every position.

    `PrefillQuantizedAttention(module)` changes the class of the attention module and returns it:
    weights, their names, hooks and references stay as they are. :meth:`restore` undoes it.

    Args:
        original: The attention module.

    Attributes:
        original_class: Class of the module before.
        parameters_of_forward: Names of its parameters, in order.
    """

    original_class: type[nn.Module]
    parameters_of_forward: tuple[str, ...]

    def __new__(cls, original: nn.Module | None = None) -> PrefillQuantizedAttention:
        """Turns `original` into a drop-in (copies of one are made without it)."""
        if original is None:
            return super().__new__(cls)
        if not isinstance(original, PrefillQuantizedAttention):
            _take_over(original)
        return original  # type: ignore[return-value]

    def __init__(self, original: nn.Module) -> None:
        """Nothing is left to do: the module has been initialized as what it was."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its own class and made a drop-in again, as the class is made at run time."""
        return _blank, (self.original_class,), self.__getstate__()

    def restore(self) -> None:
        """Makes the module what it was before."""
        self.__class__ = self.original_class  # type: ignore[assignment]
        hooked = self.__dict__.get("_old_forward")
        if hooked is not None:
            self.__dict__["_old_forward"] = type(self).forward.__get__(self)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `[batch_size, new_len, hidden_size]` over the cache and the new tokens.

        Raises:
            UserError: The call asks for what the cache cannot give, or has an unknown argument.
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
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        queries = module.q_proj(hidden_states).view(shape)
        keys = module.k_proj(hidden_states).view(shape)
        values = module.v_proj(hidden_states).view(shape).transpose(1, 2)
        if "q_norm" in self._modules:
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)

        def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # Looked up in here, as a decode step does without.
            implementation = module.config._attn_implementation
            function = ALL_ATTENTION_FUNCTIONS.get(implementation, ALL_ATTENTION_FUNCTIONS["sdpa"])
            others = {name: value for name, value in given.items() if name not in _USED}
            mask = given.get("attention_mask")
            out: torch.Tensor = function(
                module, q, k, v, mask, dropout=0.0, scaling=module.scaling, **others
            )[0]
            return out

        output = _attend(module, cache, queries, keys, values, rope, module.scaling, full)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return module.o_proj(output), None


def _blank(own: type[nn.Module]) -> nn.Module:
    """A drop-in without state, in the place of a module of the class `own`."""
    module = own.__new__(own)
    _take_over(module)
    return module


_CLASSES: dict[type[nn.Module], type[PrefillQuantizedAttention]] = {}


def _take_over(module: nn.Module) -> None:
    """Gives an attention module the class that is both its own and a drop-in."""
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
    if hooked is not None:  # accelerate keeps the method that its hooks surround in the instance
        module.__dict__["_old_forward"] = _CLASSES[own].forward.__get__(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Class of an attention module before it was made a drop-in, or its class."""
    if isinstance(module, PrefillQuantizedAttention):
        return module.original_class
    return type(module)
