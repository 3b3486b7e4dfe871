"""The storage of one layer under each scheme, and as KVQuant's public code grows it.

A store keeps the keys and values that each call appends. Nothing here computes attention.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.fp16_layer import Fp16Layer
from kvquant.cache.layout import Layout
from kvquant.quantization.ranged_tables import ranged_tables
from kvquant.schemes.registry import build_codecs
from kvquant.study.scheme_kinds import CalibratedScheme
from kvquant.study.schemes import SchemeSpec


class Store(Protocol):
    """Interface of the stores that the benchmark times."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Appends keys and values, fp16 `[batch_size, num_kv_heads, new_len, head_dim]` each."""

    @property
    def nbytes(self) -> int:
        """Bytes that the store holds."""


class GrowingStore:
    """The unquantized cache of transformers: one tensor, concatenated in each call."""

    def __init__(self) -> None:
        self._layer = Fp16Layer()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Appends keys and values; see :class:`Store`."""
        self._layer.update(keys, values)

    @property
    def nbytes(self) -> int:
        """Bytes that the store holds."""
        return int(self._layer.keys.nbytes + self._layer.values.nbytes)


class BlockedStore:
    """The block store of KVQuant's cache.

    The time of a call includes its plan, which all layers of a model would share.

    Args:
        codec: The scheme's codec for one layer.
    """

    def __init__(self, codec: Codec) -> None:
        self._layout = Layout(codec.sinks, codec.block_size, codec.residual)
        self._store = BlockStore(codec)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Appends keys and values; see :class:`Store`."""
        batch, _, new, _ = keys.shape
        plan = self._layout.append([slice(0, new)] * batch)
        self._store.append(plan, keys, values)

    @property
    def nbytes(self) -> int:
        """Bytes that the store holds."""
        return self._store.nbytes


class _GrowingSparse:
    """Holds the outliers of one sequence in standard compressed form, grown by concatenation.

    A token is a column of the keys' CSC matrix or a row of the values' CSR matrix, which have the
    same layout in memory.

    Attributes:
        pointers: int32 `[tokens + 1]`, first outlier of each token.
        channels: int32 `[outliers]`, channel of each outlier.
        values: fp32 `[outliers]`.
    """

    def __init__(self, device: torch.device) -> None:
        self.pointers = torch.zeros(1, dtype=torch.int32, device=device)
        self.channels = torch.zeros(0, dtype=torch.int32, device=device)
        self.values = torch.zeros(0, dtype=torch.float32, device=device)

    def append(self, counts: torch.Tensor, channels: torch.Tensor, values: torch.Tensor) -> None:
        """Appends tokens: int32 `[new_len]` counts, and channels and values of their outliers."""
        ends = self.pointers[-1] + counts.cumsum(0, dtype=torch.int32)
        self.pointers = torch.cat([self.pointers, ends])
        self.channels = torch.cat([self.channels, channels])
        self.values = torch.cat([self.values, values])

    @property
    def nbytes(self) -> int:
        """Bytes of the pointers, channels and values."""
        return self.pointers.nbytes + self.channels.nbytes + self.values.nbytes


class ConcatenatedStore:
    """Appends decoded tokens as KVQuant's public code does, in PyTorch.

    In that code (`quant_cuda_kernel.cu`, format "orig" of the LLaMA cache), codes go into memory
    that was allocated for `capacity` tokens. The host then reads how many outliers a token has, and
    the pointer, index and value arrays of the sparse part are concatenated, which allocates and
    copies them whole. Sequences are processed one by one, as that code has no batches.

    Quantization, outliers and packing are this library's, with blocks of one token, so both sides
    do the same work per token. KVQuant's kernels would need fewer launches, which shifts the curve,
    but does not change its growth.

    Args:
        codec: Codec of a scheme whose blocks may hold a single token.
        capacity: Largest number of tokens in a sequence.
    """

    def __init__(self, codec: Codec, capacity: int) -> None:
        self._codec = codec
        self._capacity = capacity
        self._length = 0
        self._dense: list[dict[str, torch.Tensor]] = []
        self._sparse: list[dict[str, _GrowingSparse]] = []

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Appends keys and values; see :class:`Store`."""
        batch, _, new, _ = keys.shape
        if not self._dense:
            self._dense, self._sparse = [{} for _ in range(batch)], [{} for _ in range(batch)]
        for b in range(batch):
            # [heads, tokens, dim] becomes blocks of one token, [tokens, heads, 1, dim].
            token_keys, token_values = (x[b].transpose(0, 1).unsqueeze(2) for x in (keys, values))
            packed = self._codec.pack(token_keys.contiguous(), token_values.contiguous())
            for name, t in packed.dense.items():
                if name not in self._dense[b]:
                    self._dense[b][name] = t.new_zeros((self._capacity, *t.shape[1:]))
                self._dense[b][name][self._length : self._length + new] = t
            for name, slab in packed.sparse.items():
                index, value = slab.coordinates()  # the host waits for their number, as in KVQuant
                width = slab.shape[1] * slab.shape[3]
                counts = slab.count.sum(1, dtype=torch.int32)
                if name not in self._sparse[b]:
                    self._sparse[b][name] = _GrowingSparse(keys.device)
                self._sparse[b][name].append(counts, (index % width).int(), value.float())
        self._length += new

    def to_standard(self, name: str, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns pointers, channels and values of a sequence's outliers ("keys" or "values")."""
        sparse = self._sparse[row][name]
        return sparse.pointers, sparse.channels, sparse.values

    @property
    def nbytes(self) -> int:
        """Bytes that the store holds."""
        dense = sum(t.nbytes for row in self._dense for t in row.values())
        return dense + sum(s.nbytes for row in self._sparse for s in row.values())


def append_codec(spec: SchemeSpec, heads: int, dim: int, device: torch.device) -> Codec | None:
    """Returns the codec of a layer calibrated for normal data, or None for the unquantized cache.

    The key ranges leave the scheme's fraction of normally distributed data outside.
    """
    tables = None
    if isinstance(spec, CalibratedScheme):
        tail = min(max(getattr(spec, "outliers", 0.0), 1e-4), 1 - 1e-4)
        half = float(torch.special.ndtri(torch.tensor(1 - tail / 2)))
        scale = torch.full((heads, dim), half)
        tables = [ranged_tables(spec, torch.zeros(heads, dim), scale).to(device)]
    codecs = build_codecs(spec, 1, tables)
    return codecs[0] if codecs else None
