"""The adapter of a model family: where its attention has queries, keys, values and rotary table.

Quantized caches know one form of attention: queries and keys before RoPE, whose channels i and
i + half are rotated together by a table as wide as a head. An adapter brings the attention of any
family in :mod:`kvquant.study.model_families` into this form. Where RoPE rotates other channels
together, or leaves some as they are, the channels of queries and keys are put in another order, by
which no score changes; a pair that is left as it is gets the angle 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kvquant.errors import UserError
from kvquant.kernels.masked_attention import soft_capped
from kvquant.models.obstacles import unsupported_attention
from kvquant.study.model_families import ModelFamily, family_of_attention

Table = tuple[torch.Tensor, torch.Tensor]
PartName = Literal["queries", "keys", "values"]


@functools.lru_cache(maxsize=64)
def channel_order(
    width: int, head_dim: int, interleaved: bool, device: torch.device
) -> torch.Tensor | None:
    """Returns the order in which a head's channels i and i + half are rotated together.

    Args:
        width: Number of channels that RoPE rotates, from the first one on.
        head_dim: Number of channels per head.
        interleaved: Whether RoPE rotates channels 2i and 2i + 1 together, instead of i and
            i + width / 2.
        device: Where the order is needed.

    Returns:
        int64 `[head_dim]`, or None where the channels have this order already.

    Raises:
        UserError: The channels do not form pairs.
    """
    if width % 2 or head_dim % 2 or not 0 < width <= head_dim:
        raise UserError(
            f"model: RoPE over {width} of {head_dim} channels per head is not supported, as pairs "
            "of channels are rotated; use a model with even numbers of both"
        )
    with torch.inference_mode(False):  # calibration takes gradients through the order
        rotated, others = torch.arange(width), torch.arange(width, head_dim)
        first, second = rotated.view(-1, 2).T if interleaved else rotated.view(2, -1)
        order = torch.cat((first, others[: len(others) // 2], second, others[len(others) // 2 :]))
        same = torch.equal(order, torch.arange(head_dim))
        return None if same else order.to(device)


@dataclass(frozen=True)
class Part:
    """The place of an attention's queries, keys or values: some of what a module gives.

    Attributes:
        module: The last module before RoPE, or before the cache for values.
        rows: The channels of its output that are meant, those of all heads.
        head_dim: Number of channels per head.
        heads_first: Whether its output is `[batch_size, num_heads, seq_len, head_dim]`.
        pairs: Whether RoPE rotates them.
        interleaved: See :class:`ModelFamily`.
    """

    module: nn.Module
    rows: slice
    head_dim: int
    heads_first: bool
    pairs: bool
    interleaved: bool

    def read(self, output: torch.Tensor, width: int) -> torch.Tensor:
        """Returns the part of an output, or of its gradient, in the order that caches know.

        Args:
            output: What the module gave, or the gradient with respect to it.
            width: Number of channels per head that RoPE rotates.

        Returns:
            `[batch_size, seq_len, num_heads * head_dim]`.
        """
        whole = output.transpose(1, 2) if self.heads_first else output
        x = whole.flatten(2)[..., self.rows]
        if not self.pairs:
            return x
        order = channel_order(width, self.head_dim, self.interleaved, x.device)
        return x if order is None else x.unflatten(-1, (-1, self.head_dim))[..., order].flatten(2)


class AttentionAdapter:
    """Reads the attention modules of one family.

    Args:
        family: How these modules are built.
    """

    def __init__(self, family: ModelFamily) -> None:
        self.family = family

    def project(
        self, module: Any, hidden_states: torch.Tensor, width: int, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes queries, keys and values before RoPE, in the order that caches know.

        Args:
            module: The attention module.
            hidden_states: `[batch_size, seq_len, hidden_size]`.
            width: Number of channels per head that RoPE rotates.
            positions: int64 `[1 or batch_size, seq_len]`; only :attr:`ModelFamily.scaled_queries`
                needs them.

        Returns:
            `[batch_size, num_heads, seq_len, head_dim]` each, keys and values with fewer heads
            where query heads share them.
        """
        family, dim = self.family, module.head_dim
        if family.fused is None:
            modules = (module.q_proj, module.k_proj, module.v_proj)
            parts = [projection(hidden_states) for projection in modules]
        else:
            parts = list(getattr(module, family.fused)(hidden_states).split(_sizes(module), -1))
        if family.norm_input == "projection":
            parts[:2] = self._normed(module, parts[:2])
        shape = (*hidden_states.shape[:-1], -1, dim)
        queries, keys, values = (x.view(shape) for x in parts)
        if family.norm_input == "heads":
            queries, keys = self._normed(module, [queries, keys])
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        if family.norm_input == "heads-first":
            queries, keys = self._normed(module, [queries, keys])
        order = channel_order(width, dim, family.interleaved, queries.device)
        if order is not None:
            queries, keys = queries[..., order], keys[..., order]
        factor = self.query_factor(module, positions)
        return queries if factor is None else queries * factor.to(queries.dtype), keys, values

    def query_factor(self, module: Any, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the factor of queries at their positions, or None where they have none.

        Args:
            module: The attention module.
            positions: int64 `[1 or batch_size, seq_len]`.

        Returns:
            `[1 or batch_size, 1, seq_len, 1]`.
        """
        if not self.family.scaled_queries:
            return None
        if positions is None:
            raise ValueError("position_ids: missing, and this family scales queries by them")
        rope = module.config.rope_parameters
        steps = torch.floor(positions / rope["original_max_position_embeddings"])
        return (1 + rope["llama_4_scaling_beta"] * torch.log(1 + steps))[:, None, :, None]

    def _normed(self, module: nn.Module, both: list[torch.Tensor]) -> list[torch.Tensor]:
        """Applies the norms of queries and keys where the attention has them."""
        names = self.family.norms
        if names[0] not in module._modules:
            return both
        return [getattr(module, name)(x) for name, x in zip(names, both, strict=True)]

    def part(self, module: Any, name: PartName) -> Part:
        """Returns where an attention module has its queries, keys or values.

        Args:
            module: The attention module.
            name: Which of them.
        """
        family, number = self.family, ("queries", "keys", "values").index(name)
        rows = slice(None)
        if number < 2 and family.norms[number] in module._modules:
            last = getattr(module, family.norms[number])
            heads_first = family.norm_input == "heads-first"
        else:
            last, heads_first = getattr(module, family.fused or f"{name[0]}_proj"), False
            if family.fused is not None:
                sizes = _sizes(module)
                rows = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        return Part(last, rows, module.head_dim, heads_first, number < 2, family.interleaved)

    def width(self, table: Table) -> int:
        """Returns the number of channels per head that a rotary table of the model's rotates.

        Args:
            table: Cosine and sine, `[..., width]` each, or half of it (:class:`ModelFamily`).
        """
        return table[0].shape[-1] * (2 if self.family.half_table else 1)

    def table(self, table: Table, head_dim: int) -> Table:
        """Returns a rotary table of the model's as caches know it.

        Args:
            table: Cosine and sine, `[1 or batch_size, seq_len, width]` each, or half of the width.
            head_dim: Number of channels per head.

        Returns:
            `[1 or batch_size, seq_len, head_dim]` each.
        """
        cos, sin = table
        if self.family.half_table:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        width = cos.shape[-1]
        if width == head_dim and not self.family.interleaved:
            return cos, sin
        step = 2 if self.family.interleaved else 1
        half = slice(0, width if self.family.interleaved else width // 2, step)
        shape = (*cos.shape[:-1], (head_dim - width) // 2)
        cos = torch.cat((cos[..., half], cos.new_ones(shape)) * 2, -1)
        return cos, torch.cat((sin[..., half], sin.new_zeros(shape)) * 2, -1)

    def rotates(self, module: Any) -> bool:
        """Returns whether an attention module has RoPE."""
        switch = self.family.rope_switch
        return switch is None or bool(getattr(module, switch))

    def sink_logits(self, module: Any) -> torch.Tensor | None:
        """Returns the learned logits of an attention's sinks; None where it has none.

        Args:
            module: The attention module.

        Returns:
            `[num_heads]`.
        """
        name = self.family.sink_logits
        if name is None:
            return None
        logits: torch.Tensor = getattr(module, name)
        return logits

    def logits(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes a model's logits from what its decoder gives, with the factors of its family.

        Args:
            model: The causal language model.
            hidden_states: `[..., hidden_size]`.

        Returns:
            `[..., vocab_size]`.
        """
        logits: torch.Tensor = model.get_output_embeddings()(hidden_states)
        if self.family.logit_divisor is not None:
            logits = logits / getattr(model.config, self.family.logit_divisor)
        if self.family.logit_factor is not None:
            logits = logits * getattr(model.config, self.family.logit_factor)
        if self.family.logit_cap is not None:
            cap = getattr(model.config, self.family.logit_cap)
            logits = logits if cap is None else soft_capped(logits, cap)
        return logits


def _sizes(module: Any) -> list[int]:
    """Returns the numbers of channels of queries, keys and values in a fused projection."""
    config, dim = module.config, module.head_dim
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [n * dim for n in heads]


@functools.cache
def adapter_of_class(attention: str) -> AttentionAdapter:
    """Returns the adapter for the attention class of this name.

    Raises:
        UserError: The class belongs to no registered family.
    """
    family = family_of_attention(attention)
    if family is None:
        raise UserError(unsupported_attention(attention))
    return AttentionAdapter(family)
