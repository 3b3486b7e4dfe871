"""One layer's storage under each scheme, and as KVQuant's public code grows it.

A store takes the keys and values of some tokens a call and keeps them; nothing here attends.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.fp16_layer import Fp16Layer
from kvquant.cache.layout import Layout
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.quantization.nuq import fit
from kvquant.schemes.registry import build_codecs
from kvquant.study.schemes import NuqScheme, SchemeSpec


class Store(Protocol):
    """What the benchmark times."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores fp16 `[batch_size, num_kv_heads, new_len, head_dim]`."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class GrowingStore:
    """The unquantized cache of transformers: one tensor, concatenated each call."""

    def __init__(self) -> None:
        self._layer = Fp16Layer()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See :class:`Store`."""
        self._layer.update(keys, values)

    @property
    def nbytes(self) -> int:
        """See :class:`Store`."""
        return int(self._layer.keys.nbytes + self._layer.values.nbytes)


class BlockedStore:
    """Ours. The plan of a call, which all layers of a model share, is counted whole."""

    def __init__(self, codec: Codec) -> None:
        self._layout = Layout(codec.sinks, codec.block_size, codec.residual)
        self._store = BlockStore(codec)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See :class:`Store`."""
        batch, _, new, _ = keys.shape
        plan = self._layout.append([slice(0, new)] * batch)
        self._store.append(plan, keys, values)

    @property
    def nbytes(self) -> int:
        """See :class:`Store`."""
        return self._store.nbytes


class _GrowingSparse:
    """Outliers of one sequence in standard compressed form, grown by concatenation.

    `pointers` int32 `[tokens + 1]`, `channels` int32 and `values` fp32 `[outliers]`: a token is a
    column of the keys' CSC matrix and a row of the values' CSR matrix, the same in memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.pointers = torch.zeros(1, dtype=torch.int32, device=device)
        self.channels = torch.zeros(0, dtype=torch.int32, device=device)
        self.values = torch.zeros(0, dtype=torch.float32, device=device)

    def append(self, counts: torch.Tensor, channels: torch.Tensor, values: torch.Tensor) -> None:
        """Adds tokens: int32 `[new_len]` counts, their outliers' channels and values."""
        ends = self.pointers[-1] + counts.cumsum(0, dtype=torch.int32)
        self.pointers = torch.cat([self.pointers, ends])
        self.channels = torch.cat([self.channels, channels])
        self.values = torch.cat([self.values, values])

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.pointers.nbytes + self.channels.nbytes + self.values.nbytes


class ConcatenatedStore:
    """What KVQuant's public code does with a decoded token, in PyTorch.

    Its append (`quant_cuda_kernel.cu`, format "orig" of the LLaMA cache): codes go into room for
    `capacity` tokens that is there from the start; the host reads how many outliers a token has;
    pointer, index and value arrays of the sparse part are then concatenated, which allocates and
    copies all that is there. One sequence at a time, as that code has no batch. Quantization,
    outliers and packing are ours for blocks of one token, so both sides do the same work a token;
    their kernels would do it in fewer launches, which shifts the curve and leaves its growth.

    Args:
        codec: Of a scheme whose blocks may hold a single token.
        capacity: Most tokens of a sequence.
    """

    def __init__(self, codec: Codec, capacity: int) -> None:
        self._codec = codec
        self._capacity = capacity
        self._length = 0
        self._dense: list[dict[str, torch.Tensor]] = []
        self._sparse: list[dict[str, _GrowingSparse]] = []

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See :class:`Store`."""
        batch, _, new, _ = keys.shape
        if not self._dense:
            self._dense, self._sparse = [{} for _ in range(batch)], [{} for _ in range(batch)]
        for b in range(batch):
            # [heads, tokens, dim] to blocks of one token [tokens, heads, 1, dim]
            token_keys, token_values = (x[b].transpose(0, 1).unsqueeze(2) for x in (keys, values))
            packed = self._codec.pack(token_keys.contiguous(), token_values.contiguous())
            for name, t in packed.dense.items():
                if name not in self._dense[b]:
                    self._dense[b][name] = t.new_zeros((self._capacity, *t.shape[1:]))
                self._dense[b][name][self._length : self._length + new] = t
            for name, slab in packed.sparse.items():
                index, value = slab.coordinates()  # the host waits for their number, as there
                width = slab.shape[1] * slab.shape[3]
                counts = slab.count.sum(1, dtype=torch.int32)
                if name not in self._sparse[b]:
                    self._sparse[b][name] = _GrowingSparse(keys.device)
                self._sparse[b][name].append(counts, (index % width).int(), value.float())
        self._length += new

    def to_standard(self, name: str, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pointers, channels and values of a sequence's outliers ("keys" or "values")."""
        sparse = self._sparse[row][name]
        return sparse.pointers, sparse.channels, sparse.values

    @property
    def nbytes(self) -> int:
        """See :class:`Store`."""
        dense = sum(t.nbytes for row in self._dense for t in row.values())
        return dense + sum(s.nbytes for row in self._sparse for s in row.values())


def append_codec(spec: SchemeSpec, heads: int, dim: int, device: torch.device) -> Codec | None:
    """A layer's codec whose calibration fits normal data: the scheme's share lies outside.

    None for the unquantized cache.
    """
    tables = None
    if isinstance(spec, NuqScheme):
        levels = fit("nf" if spec.datatype == "nuq" else spec.datatype, spec.bits)
        tail = min(max(spec.outliers, 1e-4), 1 - 1e-4)
        half = float(torch.special.ndtri(torch.tensor(1 - tail / 2)))
        scale = torch.full((heads, dim), half)
        tables = [LayerQuantizer(torch.zeros(heads, dim), scale, levels, levels).to(device)]
    codecs = build_codecs(spec, 1, tables)
    return codecs[0] if codecs else None
