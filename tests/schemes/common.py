"""Schemes over tiny models in memory, and what their tests share."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.models.loading import QuantizedModel, install_attention
from kvquant.quantization.nuq import fit
from kvquant.schemes.registry import ModelShape, build_caches, build_codecs
from kvquant.study.digests import needs_calibration
from tests.conftest import tiny_model

DIM = 16


def tables(bits: int, heads: int = 2, dim: int = DIM, layers: int = 2) -> list[LayerQuantizer]:
    """Ranges of random keys, so narrow that a few percent are outliers; NF levels."""
    generator = torch.Generator().manual_seed(1)
    return [
        LayerQuantizer(
            torch.randn(heads, dim, generator=generator) * 0.05,
            torch.rand(heads, dim, generator=generator) * 0.2 + 0.3,
            fit("nf", bits),
            fit("nf", bits),
        )
        for _ in range(layers)
    ]


def with_scheme(spec: Any, model: Any = None) -> QuantizedModel:
    """A tiny model (default: GQA 4/2) with the caches of a scheme."""
    model = tiny_model() if model is None else model
    heads = model.config.num_key_value_heads
    found = tables(spec.bits, heads) if needs_calibration(spec) else None
    install_attention(model)
    caches = build_caches(spec, ModelShape(2, heads, DIM), found)
    return QuantizedModel(model, None, spec, build_codecs(spec, 2, found), caches)


@torch.inference_mode()
def feed(
    qm: QuantizedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    chunks: list[int],
    protocol: Any = "A",
) -> tuple[torch.Tensor, Any]:
    """Runs the columns in chunks; returns logits `[batch, columns, vocabulary]` and the cache."""
    cache = qm.new_cache(protocol)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    logits, at = [], 0
    for size in chunks:
        part = slice(at, at + size)
        out = qm.model(
            input_ids=ids[:, part],
            attention_mask=None if mask is None else mask[:, : at + size],
            position_ids=None if positions is None else positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        at += size
    return torch.cat(logits, 1), cache


def ragged(lengths: list[int], side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random rows, and them padded: ids and mask."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(1, 97, (n,), generator=generator) for n in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        width, n = ids.shape[1], len(row)
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[b, place], mask[b, place] = row, 1
    return rows, ids, mask


def blocks(seed: int = 0, shape: tuple[int, int, int, int] = (3, 2, 32, 64)) -> torch.Tensor:
    """Standard normal fp16 blocks `[blocks, num_kv_heads, block_size, head_dim]`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Squared error over squared magnitude."""
    return float((found - exact.float()).square().sum() / exact.float().square().sum())


def assert_fake_is_packed(codec: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Checks that pack → unpack is fake bit for bit, whatever the number of tokens looked at."""
    shape: Any = tuple(keys.shape)
    found = codec.unpack(codec.pack(keys, values), shape)
    for block in range(shape[0]):
        for count in (1, 5, shape[2]):
            part = slice(block, block + 1)
            fake = codec.fake(keys[part, :, :count], values[part, :, :count])
            for a, b in zip(found, fake, strict=True):
                assert torch.equal(a[part, :, :count], b)
