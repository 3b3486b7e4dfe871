"""An unquantized 16-bit cache that is allocated once.

It is the baseline of long prompts, because transformers' `DynamicCache` copies everything it holds
at every step. Its `StaticCache` is allocated once too, but returns the whole allocation, so every
call needs a mask of the unwritten part and prefill cannot use the attention kernels without a mask.
This layer allocates as `StaticCache` does and returns only what is written.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from kvquant.cache.fp16_layer import Fp16Layer
from kvquant.cache.interface import CountedCache
from kvquant.schemes.registry import CacheFactory, ModelShape, Tables
from kvquant.study.schemes import Fp16StaticScheme


class StaticFp16Layer(Fp16Layer):
    """A layer of a 16-bit cache, allocated with room for later tokens.

    Args:
        room: Tokens allocated beyond those of the first call, and whenever the room is used up.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values and returns all of them, `[batch_size, heads, seq_len, dim]`."""
        kind = key_states.dtype
        if kind is torch.float32:
            key_states, value_states = key_states.half(), value_states.half()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: list[Any] = [getattr(self, name) for name in ("keys", "values")]
        old = self.get_seq_length()
        total = old + key_states.shape[2]
        whole = self._buffers
        if whole is None or total > whole[0].shape[2] or whole[0].shape[0] != key_states.shape[0]:
            whole = self._allocate(key_states, total), self._allocate(key_states, total)
            if old:
                for buffer, x in zip(whole, held, strict=True):
                    buffer[:, :, :old] = x
            self._buffers = whole
        for buffer, new in zip(whole, (key_states, value_states), strict=True):
            buffer[:, :, old:total] = new
        self.keys, self.values = whole[0][:, :, :total], whole[1][:, :, :total]
        return self.keys.to(kind), self.values.to(kind)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` further tokens, if there is less."""
        held: list[Any] = [self.keys, self.values]
        total = self.get_seq_length()
        whole = self._buffers
        if whole is not None and whole[0].shape[2] >= total + tokens:
            return
        self._room = tokens
        whole = self._allocate(held[0], total), self._allocate(held[1], total)
        for buffer, x in zip(whole, held, strict=True):
            buffer[:, :, :total] = x
        self._buffers = whole
        self.keys, self.values = whole[0][:, :, :total], whole[1][:, :, :total]

    @property
    def allocation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All allocated keys and values, `[batch_size, heads, columns, head_dim]` each.

        Raises:
            ValueError: Nothing is stored yet.
        """
        if self._buffers is None:
            raise ValueError("cache: nothing is allocated; call reserve() after the prompts")
        return self._buffers

    def _allocate(self, like: torch.Tensor, total: int) -> torch.Tensor:
        batch, heads, _, dim = like.shape
        with torch.inference_mode(False):  # later calls write to it, also outside of that mode
            return like.new_empty((batch, heads, total + self._room, dim))

    def reset(self) -> None:
        """Removes all tokens and frees the allocation."""
        super().reset()
        self._buffers = None

    def _moved(self) -> None:
        # `keys` and `values` are copies now, so the next update allocates room for them again.
        self._buffers = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences, as beam search needs."""
        super().reorder_cache(beam_idx)
        self._moved()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the sequences with the given indices."""
        super().batch_select_indices(indices)
        self._moved()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence the given number of times."""
        super().batch_repeat_interleave(repeats)
        self._moved()

    @property
    def nbytes(self) -> int:
        """Returns the bytes that the layer has allocated."""
        held: Any = self._buffers or (self.keys, self.values)
        return sum(t.nbytes for t in held if t is not None)


class StaticFp16Cache(Cache, CountedCache):
    """A 16-bit cache whose layers are allocated once.

    Args:
        num_layers: Number of layers of the model.
        room: See :class:`StaticFp16Layer`.
    """

    def __init__(self, num_layers: int, room: int) -> None:
        super().__init__(layers=[StaticFp16Layer(room) for _ in range(num_layers)])

    @torch.inference_mode()
    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` further tokens of each sequence, one layer after the other."""
        for layer in self.layers:
            layer.reserve(tokens)

    def stored_nbytes(self) -> int:
        """Returns the bytes that all layers have allocated, unused room included."""
        return sum(layer.nbytes for layer in self.layers)

    def stored_elements(self, mask: torch.Tensor | None) -> int:
        """Returns the number of key and value elements of real tokens, without padding."""
        total = 0
        for layer in self.layers:
            if layer.keys is not None:
                batch, heads, columns, dim = layer.keys.shape
                tokens = batch * columns if mask is None else int(mask.sum())
                total += 2 * heads * dim * tokens
        return total


def make_caches(spec: Fp16StaticScheme, shape: ModelShape, tables: Tables) -> CacheFactory:
    """Returns a function that makes empty caches."""
    return lambda protocol, rope: StaticFp16Cache(shape.num_layers, spec.room)
