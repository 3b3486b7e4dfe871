"""Makes a scheme's codec for a model's shape alone, and measures the blocks that it packs."""

from __future__ import annotations

import torch

from kvquant.cache.codec import Codec
from kvquant.cache.memory_formula import PackedBlocks
from kvquant.quantization.ranged_tables import ranged_tables
from kvquant.schemes.registry import build_codecs
from kvquant.study.scheme_kinds import Scheme


def shape_codec(scheme: Scheme, heads: int, dim: int) -> Codec | None:
    """Returns the codec of one layer of a model that is not loaded, or None for a scheme without.

    A calibrated scheme gets tables of the right sizes, as if all keys were between -1 and 1.

    Args:
        scheme: The scheme.
        heads: Number of key/value heads.
        dim: Channels per head.

    Raises:
        UserError: The scheme does not serve such a model.
    """
    if scheme.registration.codec is None:
        return None
    tables = None
    if scheme.registration.calibrated:
        tables = [ranged_tables(scheme, torch.zeros(heads, dim), torch.ones(heads, dim))]
    codecs = build_codecs(scheme, 1, tables)
    assert codecs is not None
    codecs[0].check_model(heads, dim)
    return codecs[0]


def packed_blocks(codec: Codec, heads: int, dim: int) -> PackedBlocks:
    """Returns the size of a codec's blocks, found by packing one on the CPU.

    Args:
        codec: A codec whose blocks all take the same bytes.
        heads: Number of key/value heads.
        dim: Channels per head.
    """
    block = torch.zeros(1, heads, codec.block_size, dim, dtype=torch.float16)
    nbytes = codec.pack(block, block).nbytes
    return PackedBlocks(codec.sinks, codec.block_size, codec.residual, nbytes, codec.shared_bytes)
