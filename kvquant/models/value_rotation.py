"""Folds the rotation of values into a model's weights, so that no token pays for it.

Values are `W_V x + b`, and the output of attention, a weighted mean of a head's values, is
multiplied by `W_O`. With `M` orthogonal, `M W_V`, `M b` and `W_O M^T` give the same model, whose
values arrive rotated. The products are computed in float64 and rounded to the dtype of the weights,
so that the logits change by rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvquant.errors import UserError
from kvquant.models.prefill_quant import FOLDED, adapter_of
from kvquant.models.tensor_parallel import kept_heads, own_tensor
from kvquant.quantization.hadamard import rotate

MARK = "kvquant_values_rotated"


def values_rotated(model: Any) -> bool:
    """Returns whether the rotation is folded into a model's weights."""
    return bool(getattr(model, MARK, False))


def refuse_rotated(model: Any, what: str) -> None:
    """Refuses a model whose values are rotated, which `what` does not expect.

    Raises:
        UserError: The rotation is folded into the weights.
    """
    if values_rotated(model):
        raise UserError(
            f"model: its values are rotated for allocated codes, which {what} does not expect: "
            "load the model again"
        )


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the first address of a tensor and the one behind its last."""
    tensor = own_tensor(tensor)
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _both(attention: Any) -> dict[str, tuple[Any, slice]]:
    """Returns the projections of values and of the output by name, and their rows that count."""
    adapter = adapter_of(attention)
    part, name = adapter.part(attention, "values"), adapter.family.fused or "v_proj"
    return {name: (part.module, part.rows), "o_proj": (attention.o_proj, slice(None))}


def obstacle(model: Any, attentions: list[Any]) -> str | None:
    """Returns why the rotation cannot be folded into a model's weights, or None.

    Args:
        model: The model.
        attentions: Its self-attention modules.
    """
    held = [(*_memory(p), name) for name, p in model.named_parameters(remove_duplicate=False)]
    for number, attention in enumerate(attentions):
        for name, (layer, _) in _both(attention).items():
            where = f"layer {number}: {name}"
            if kept_heads(attention) is not None:
                return f"{where} is shared among processes across heads"
            if type(layer) is not nn.Linear:  # a subclass may hold quantized or adapted weights
                return f"{where} is no plain linear layer"
            if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return f"{where} has {layer.weight.dtype} weights"
            bias = None if name == "o_proj" else layer.bias
            for first, end in map(_memory, (x for x in (layer.weight, bias) if x is not None)):
                found = [other for begin, last, other in held if begin < end and first < last]
                if len(found) > 1:  # not its own name alone
                    return f"{where} shares its weights ({', '.join(found)})"
    return None


@torch.no_grad()
def fold_value_rotation(model: Any, attentions: list[Any], head_dim: int) -> bool:
    """Rotates the values of a model by its weights, in place.

    Args:
        model: The model, which is marked.
        attentions: Its self-attention modules.
        head_dim: Channels per head.

    Returns:
        Whether it was done; False leaves the weights as they are (see :func:`obstacle`).
    """
    if values_rotated(model):
        return True
    if obstacle(model, attentions) is not None:
        return False
    for attention in attentions:
        (values, rows), (output, _) = _both(attention).values()
        weight = own_tensor(values.weight)[rows]
        by_head = weight.double().unflatten(0, (-1, head_dim)).transpose(1, 2)
        weight.copy_(rotate(by_head).transpose(1, 2).flatten(0, 1))
        if values.bias is not None:
            bias = own_tensor(values.bias)[rows]
            bias.copy_(rotate(bias.double().unflatten(0, (-1, head_dim))).flatten())
        weight = own_tensor(output.weight)
        weight.copy_(rotate(weight.double().unflatten(1, (-1, head_dim))).flatten(1))
        setattr(attention, FOLDED, tuple(_both(attention)))
    setattr(model, MARK, True)
    return True
