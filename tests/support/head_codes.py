"""What codecs store of some of the kv heads, and of all."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.cache.codec import Codec
from kvquant.formats.head_share import HeadShare
from kvquant.schemes.registry import build_codecs
from kvquant.study.schemes import (
    AllocatedScheme,
    BlockGtqScheme,
    CqScheme,
    Fp8Scheme,
    Int4HadamardScheme,
    KiviScheme,
    KvarnScheme,
    NuqScheme,
    TurboQuantScheme,
    WushKvScheme,
)
from tests.support.quantizers import (
    blocks,
    narrow_tables,
    random_allocated,
)

HEADS, KV_HEADS, DIM = 8, 4, 16
PACKING: list[Any] = [
    NuqScheme(kind="nuq", bits=3, block_size=32, outliers=0.03),
    NuqScheme(kind="nuq", bits=2, block_size=32, outliers=0.0),
    NuqScheme(kind="nuq", bits=4, block_size=32, outliers=1.0),
    AllocatedScheme(kind="allocated", block_size=32),
    AllocatedScheme(kind="allocated", block_size=32, value_range="token-head"),
    AllocatedScheme(kind="allocated", block_size=32, value_range="token-unscaled", rotation=False),
    KiviScheme(kind="kivi", bits=4, group=16, residual=16),
    Fp8Scheme(kind="fp8", block_size=32),
    TurboQuantScheme(kind="turboquant", bits=3, block_size=32),
    Int4HadamardScheme(kind="int4-hadamard", block_size=32),
    KvarnScheme(kind="kvarn", bits=4, tile=32, sinks=1),
    BlockGtqScheme(kind="block-gtq", bits=2.5, value_bits=3, block_size=32),
    WushKvScheme(kind="wush-kv", bits=3, block_size=32),
    CqScheme(kind="cq", bits=2.0, channels=2, block_size=32),
]
SHAPE = (3, KV_HEADS, 32, DIM)


def tables_of(scheme: Any, dim: int = DIM, device: str = "cpu") -> list[Any] | None:
    """Tables of one layer whose heads differ."""
    if not scheme.registration.calibrated:
        return None
    if scheme.kind == "allocated":
        return [random_allocated(KV_HEADS, dim).to(device)]
    return [table.to(device) for table in narrow_tables(scheme, KV_HEADS, dim, 1)]


def coded(codec: Codec, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """What a codec stores: what it reads back, and what it reads of unfinished blocks."""
    shape: Any = tuple(keys.shape)
    packed = codec.pack(keys, values)
    ranges = [packed.dense[name] for name in ("zero", "scale") if name in packed.dense]
    ranges = ranges if ranges and ranges[0].dim() == 2 else []
    return [*codec.unpack(packed, shape), *codec.fake(keys[:, :, :5], values[:, :, :5]), *ranges]


def codes(share: HeadShare | None) -> list[list[torch.Tensor]]:
    """What the codecs of all schemes store of a process's heads, or of all."""
    keys, values = blocks(1, SHAPE), blocks(2, SHAPE) * 3
    values[0, :, 3] = values[0, :, 4, :1]  # ties
    found = []
    for scheme in PACKING:
        codec = build_codecs(scheme, 1, tables_of(scheme), share)
        assert codec is not None
        own = [x if share is None else share.part(x, 1) for x in (keys, values)]
        found.append(coded(codec[0], *own))
    return found


def outlier_rows() -> torch.Tensor:
    """Rows with ties, zeros of both signs, and nothing but one number."""
    rows = (blocks(3, (1, 1, 40, 32))[0, 0] * 3).round()
    rows[1], rows[2, ::2], rows[2, 1::2] = 2.0, 0.0, -0.0
    return rows
