"""What codecs store of some of the kv heads, and of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache.arena import Arena
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
    random_quantizer,
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
ON_GPUS: list[Any] = [
    NuqScheme(kind="nuq", bits=3),
    AllocatedScheme(kind="allocated"),
    AllocatedScheme(kind="allocated", value_range="token-head"),
]
SHAPE = (3, KV_HEADS, 32, DIM)


@dataclass(frozen=True)
class Alone(HeadShare):
    """All heads, as a share of one process, with nobody to talk to."""

    rank: int = 0
    ranks: int = 1
    heads: int = KV_HEADS

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers themselves."""
        return x

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return x


def tables_of(scheme: Any) -> list[Any] | None:
    """Tables of one layer whose heads differ."""
    if not scheme.registration.calibrated:
        return None
    if scheme.kind == "allocated":
        return [random_allocated(KV_HEADS, DIM)]
    return list(narrow_tables(scheme, KV_HEADS, DIM, 1))


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


def kernel_codes(share: HeadShare | None) -> list[list[torch.Tensor]]:
    """What the kernels of a GPU store, which pack two calls of blocks into one arena."""
    found = []
    for scheme in ON_GPUS:
        tables: Any = random_quantizer(KV_HEADS, 64, 3, scale=(3, 4))
        if scheme.kind == "allocated":
            tables = random_allocated(KV_HEADS, 64, scale=(3, 4))
        codec = (build_codecs(scheme, 1, [tables.to("cuda")], share) or [])[0]
        keys, values = (blocks(seed, (5, KV_HEADS, 64, 64)).cuda() for seed in (1, 2))
        both = [x if share is None else share.part(x, 1).contiguous() for x in (keys, values)]
        room = codec.reserve(5, both[0])
        assert room is not None  # kernels pack
        arena, status = Arena(5, room), torch.zeros(2, dtype=torch.int32, device="cuda")
        for part in (slice(0, 3), slice(3, 5)):
            codec.pack_into(arena.view(part), both[0][part], both[1][part], status)
        assert status.tolist() == [0, 0]
        shape: Any = tuple(both[0].shape)
        read = codec.unpack(arena.view(slice(0, 5)), shape)
        found.append([x.cpu() for x in read])
    return found
