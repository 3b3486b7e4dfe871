"""The Hugging Face cache whose layers hold packed blocks.

`KVQuantCache` is passed to a model as `past_key_values`; the attention modules installed by
:func:`kvquant.models.load_quantized_model` read and write it. Once per forward call the model tells
the cache which columns are tokens (`begin_forward`), so that padding is neither stored nor counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from kvquant.block_store import BlockStore
from kvquant.schemes.base import Codec

Protocol = Literal["A", "B"]
Rope = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in the half-split form of Llama.

    Args:
        x: `[batch_size, num_heads, seq_len, head_dim]`.
        cos: `[batch_size or 1, seq_len, head_dim]`.
        sin: The same shape.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


class Fp16Layer(DynamicLayer):
    """The unquantized baseline: transformers' growing layer, always holding 16-bit numbers.

    With a 16-bit model it is `DynamicLayer`; with an fp32 model (CPU) it rounds what it holds to
    fp16, so that the baseline's bits and accuracy are those of a 16-bit cache.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends and returns all keys and values `[batch_size, heads, seq_len, head_dim]`."""
        kind = key_states.dtype
        if kind is not torch.float32:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = super().update(key_states.half(), value_states.half(), *args, **kwargs)
        return keys.to(kind), values.to(kind)


class BlockLayer(CacheLayerMixin):
    """A layer of `KVQuantCache`; its tensors live in a :class:`BlockStore`."""

    is_sliding = False
    is_compileable = False

    def __init__(self, codec: Codec, owner: KVQuantCache) -> None:
        super().__init__()
        self.store = BlockStore(codec)
        self.codec = codec
        self._owner = owner
        self.columns = 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the store allocates on its first append."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not available: an attention that does not know the cache would read it wrongly."""
        raise RuntimeError(
            "KVQuantCache needs the attention of kvquant: load the model through "
            "kvquant.models.load_quantized_model"
        )

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new tokens and returns what the queries of this call attend to.

        Args:
            keys: New keys before RoPE, `[batch_size, num_kv_heads, new_len, head_dim]`.
            values: New values, the same shape.
            cos: Rotary table of the new tokens, `[batch_size, new_len, head_dim]`.
            sin: The same shape.

        Returns:
            Rotated keys and values `[batch_size, num_kv_heads, columns, head_dim]`, in the columns
            of the caller's attention mask.
        """
        owner, past = self._owner, self.columns
        rotated = rotate(keys, cos, sin)
        stored = rotated if self.codec.rotated_keys else keys
        total = past + keys.shape[2]
        if owner.protocol == "B":
            self._append(stored, values)
            self.columns = total
            return self._read(keys, total)
        if past == 0:
            self._append(stored, values)
            self.columns = total
            return rotated, values
        all_keys, all_values = self._read(keys, total, past)
        all_keys[:, :, past:] = rotated
        all_values[:, :, past:] = values
        self._append(stored, values)
        self.columns = total
        return all_keys, all_values

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        owner = self._owner
        if owner.timed and keys.is_cuda:
            torch.cuda.synchronize(keys.device)
        start = time.perf_counter()
        self.store.append(keys, values, owner.spans)
        if owner.timed and keys.is_cuda:
            torch.cuda.synchronize(keys.device)
        owner.quantize_seconds += time.perf_counter() - start

    def _read(
        self, like: torch.Tensor, columns: int, used: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantizes into the columns `[0, used)` of new buffers of `columns` columns."""
        used = columns if used is None else used
        batch, heads, _, dim = like.shape
        slots = self._owner.slots
        lengths = self.store.lengths
        longest = max(lengths)
        plain = slots is None
        width = columns if plain else longest
        keys = like.new_zeros((batch, heads, width, dim))
        values = like.new_zeros((batch, heads, width, dim))
        self.store.read(keys, values, fake_tail=self._owner.protocol == "B")
        if not self.codec.rotated_keys:
            cos, sin = self._owner.rope_table(longest, like)
            keys[:, :, :longest] = rotate(keys[:, :, :longest], cos, sin)
        if slots is None:
            return keys, values
        index = slots[:, None, :used, None].expand(batch, heads, used, dim)
        out = like.new_zeros((2, batch, heads, columns, dim))
        out[0, :, :, :used] = keys.gather(2, index)
        out[1, :, :, :used] = values.gather(2, index)
        return out[0], out[1]

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included, as transformers counts."""
        return self.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (older name)."""
        return -1

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Key length and offset for the attention mask of a call with `query_length` columns."""
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        return self.columns + query_length, 0

    def reset(self) -> None:
        """Forgets everything."""
        self.store = BlockStore(self.codec)
        self.columns = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search."""
        self.store.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences."""
        self.store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        count = torch.arange(len(self.store.lengths))
        self.store.select(count.repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: packed blocks are small and stay on their device."""
        raise NotImplementedError("offloading: KVQuantCache does not offload its blocks")

    def crop(self, *args: Any) -> None:
        """Refused: a cut inside a packed block would need its tokens in 16 bits."""
        raise NotImplementedError("crop: KVQuantCache cannot cut packed blocks yet")


class KVQuantCache(Cache):
    """A transformers cache of packed blocks.

    Args:
        codecs: One a layer.
        rope: Positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`.
        protocol: "A": the tokens of a call attend to each other in full precision and to the past
            from the cache (serving). "B": everything is read from the cache (KVQuant's perplexity).

    Attributes:
        timed: Synchronise around quantization so that `quantize_seconds` is right on a GPU.
        quantize_seconds: Time spent in quantize and pack since creation.
    """

    def __init__(self, codecs: list[Codec], rope: Rope, protocol: Protocol = "A") -> None:
        if protocol not in ("A", "B"):
            raise ValueError(f"protocol: must be 'A' or 'B', got {protocol!r}")
        super().__init__(layers=[BlockLayer(codec, self) for codec in codecs])
        self.protocol = protocol
        self.timed = False
        self.quantize_seconds = 0.0
        self.spans: list[slice | torch.Tensor] = []
        self.slots: torch.Tensor | None = None
        self._rope = rope
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin_forward(self, batch: int, new_len: int, mask: torch.Tensor | None) -> None:
        """Notes which columns of the coming call are tokens.

        Args:
            batch: Sequences.
            new_len: New columns.
            mask: `[batch_size, columns]` with 1 = token, 0 = padding, or None for no padding.

        Raises:
            ValueError: The mask does not cover all columns.
        """
        total = self.get_seq_length() + new_len
        self._table = None
        if mask is None:
            if self.slots is not None:
                raise ValueError("attention_mask: needed for every call of a padded batch")
            self.spans = [slice(0, new_len)] * batch
            return
        if mask.dim() != 2 or tuple(mask.shape) != (batch, total):
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)}, expected {(batch, total)} "
                "(tokens so far and new ones)"
            )
        if new_len == 1 and total > 1 and mask.is_cuda:
            # A decode step: every sequence gets one token, and looking would wait for the device.
            self.spans = [slice(0, 1)] * batch
            if self.slots is not None:
                self.slots = (mask.long().cumsum(1) - 1).clamp_(min=0)
            return
        host = mask.bool().cpu()
        if bool(host.all()):
            self.spans, self.slots = [slice(0, new_len)] * batch, None
            return
        if not bool(host.any(1).all()):
            raise ValueError("attention_mask: a prompt without a single token")
        self.slots = (mask.long().cumsum(1) - 1).clamp_(min=0)
        self.spans = []
        for row in host[:, total - new_len :]:
            where = row.nonzero().view(-1)
            if where.numel() and int(where[-1] - where[0]) + 1 == where.numel():
                self.spans.append(slice(int(where[0]), int(where[-1]) + 1))
            else:
                self.spans.append(where.to(mask.device))

    def rope_table(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary table of positions 0..length-1, made once a call and shared by all layers."""
        if self._table is None or self._table[0].shape[1] != length:
            positions = torch.arange(length, device=like.device)[None]
            cos, sin = self._rope(positions)
            self._table = (cos.to(like.dtype), sin.to(like.dtype))
        return self._table


def new_baseline_cache() -> Cache:
    """An unquantized 16-bit cache that grows as transformers' `DynamicCache` does."""
    return Cache(layer_class_to_replicate=Fp16Layer)


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache has allocated on its device."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, BlockLayer):
            total += layer.store.nbytes
        elif layer.keys is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def cache_elements(cache: Cache, mask: torch.Tensor | None = None) -> int:
    """Key and value elements of the tokens in a cache.

    Args:
        cache: The cache.
        mask: `[batch_size, columns]` for an unquantized cache of a padded batch, which cannot tell
            padding itself; its padding is then memory without elements.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, BlockLayer):
            total += layer.store.elements
        elif layer.keys is not None:
            batch, heads, columns, dim = layer.keys.shape
            tokens = batch * columns if mask is None else int(mask.sum())
            total += 2 * heads * dim * tokens
    return total
