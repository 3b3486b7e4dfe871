"""Quantizers of one layer with random or given key ranges, their files and codecs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvquant.cache.codec import Codec
from kvquant.formats.allocated_layer import AllocatedLayer, padded_levels
from kvquant.formats.lane_layout import looked_up
from kvquant.formats.layer_quantizer import LayerQuantizer, LayerTables
from kvquant.quantization.nuq import fit
from kvquant.quantization.quantizer_file import (
    QuantizerManifest,
    read_quantizer,
    save_quantizer,
)
from kvquant.quantization.ranged_tables import ranged_tables
from kvquant.schemes.registry import build_codecs


def random_quantizer(
    heads: int,
    dim: int,
    bits: int,
    *,
    zero: float = 0.2,
    scale: tuple[float, float] = (0.5, 1.5),
    values: str = "nf",
    seed: int = 0,
) -> LayerQuantizer:
    """Random key ranges with the levels of a normal distribution.

    Args:
        heads: Key/value heads.
        dim: Elements per head.
        bits: Of a code.
        zero: Standard deviation of the middles of the ranges.
        scale: Smallest and largest half of a range.
        values: Datatype of the levels of values, "nf" or "uniform".
        seed: Of the ranges.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = scale
    return LayerQuantizer(
        torch.randn(heads, dim, generator=generator) * zero,
        torch.rand(heads, dim, generator=generator) * (high - low) + low,
        fit("nf", bits),
        fit(values, bits),
    )


def random_allocated(
    heads: int, dim: int, *, scale: tuple[float, float] = (0.5, 1.5), seed: int = 0
) -> AllocatedLayer:
    """Tables of allocated codes whose ranges, pairs, widths and levels are random.

    Args:
        heads: Key/value heads.
        dim: Elements per head, a multiple of 16.
        scale: Smallest and largest half of a key range.
        seed: Of everything.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def widths(*shape: int) -> torch.Tensor:
        return torch.randint(1, 7, shape, generator=generator).float()

    def levels(*, of_keys: bool) -> torch.Tensor:
        def some(width: int) -> torch.Tensor:
            if width in looked_up(of_keys=of_keys):
                return (uniform(2**width) * 2 - 1).sort().values
            ends = uniform(2) * 0.5 + 0.5
            return torch.linspace(-float(ends[0]), float(ends[1]), 2**width)

        return padded_levels({w: some(w) for w in range(1, 7)})

    low, high = scale
    pairs = torch.stack([torch.randperm(dim // 2, generator=generator) for _ in range(heads)])
    return AllocatedLayer(
        torch.randn(heads, dim, generator=generator) * 0.2,
        uniform(heads, dim) * (high - low) + low,
        pairs.float(),
        widths(heads, dim // 16),
        levels(of_keys=True),
        uniform(heads) * 3 + 1,
        widths(heads),
        levels(of_keys=False),
    )


def constant_quantizer(heads: int, dim: int, bits: int, scale: float) -> LayerQuantizer:
    """The same key range `[-scale, scale]` in every channel."""
    levels = fit("nf", bits)
    return LayerQuantizer(torch.zeros(heads, dim), torch.full((heads, dim), scale), levels, levels)


def narrow_quantizers(
    bits: int, heads: int = 2, dim: int = 16, layers: int = 2
) -> list[LayerQuantizer]:
    """Key ranges so narrow that a few percent of a tiny model's keys are outliers."""
    return [
        random_quantizer(heads, dim, bits, zero=0.05, scale=(0.3, 0.5), seed=layer)
        for layer in range(layers)
    ]


def narrow_tables(spec: Any, heads: int, dim: int, layers: int = 2) -> list[LayerTables]:
    """Tables of any calibrated scheme with the key ranges of :func:`narrow_quantizers`."""
    ranges = narrow_quantizers(3, heads, dim, layers)
    return [ranged_tables(spec, layer.key_zero, layer.key_scale) for layer in ranges]


def layer_codec(spec: Any, dim: int, heads: int = 2) -> Codec:
    """The codec of one layer; random key ranges where the scheme is calibrated."""
    quantizers = None
    if spec.kind == "nuq":
        quantizers = [random_quantizer(heads, dim, spec.bits, zero=0.1, scale=(1.5, 2.5))]
    codecs = build_codecs(spec, 1, quantizers)
    assert codecs is not None
    return codecs[0]


def save_made_quantizer(
    path: Path, scheme: Any, weights: str, layers: Any, kv_heads: int = 2, dim: int = 16
) -> Path:
    """Saves the quantizers of a tiny model's layers as those of the scheme `nuq3`."""
    manifest = QuantizerManifest(
        library_version="0",
        model="tiny",
        weights_sha256=weights,
        scheme="nuq3",
        spec=scheme.model_dump(mode="json"),
        calibration={},
        spec_digest="0",
        num_layers=len(layers),
        num_kv_heads=kv_heads,
        head_dim=dim,
        calibration_error={"keys": 0.25},
    )
    save_quantizer(path, manifest, layers)
    return path


def token_major(x: torch.Tensor) -> torch.Tensor:
    """`[blocks * size, heads * dim]` of blocks `[blocks, heads, size, dim]`."""
    blocks, heads, size, dim = x.shape
    return x.transpose(1, 2).reshape(blocks * size, heads * dim)


def blocks(seed: int = 0, shape: tuple[int, int, int, int] = (3, 2, 32, 64)) -> torch.Tensor:
    """Standard normal fp16 blocks `[blocks, num_kv_heads, block_size, head_dim]`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Squared error over squared magnitude."""
    return float((found - exact.float()).square().sum() / exact.float().square().sum())


def assert_fake_is_packed(codec: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Pack -> unpack is fake bit for bit, whatever the number of tokens looked at."""
    shape: Any = tuple(keys.shape)
    found = codec.unpack(codec.pack(keys, values), shape)
    for block in range(shape[0]):
        for count in (1, 5, shape[2]):
            part = slice(block, block + 1)
            fake = codec.fake(keys[part, :, :count], values[part, :, :count])
            for a, b in zip(found, fake, strict=True):
                assert torch.equal(a[part, :, :count], b)


def save_random_quantizer(
    folder: Path, model: str, scheme: str, digest: str, zero: float = 0.3
) -> str:
    """Writes the files of a quantizer of 3 bits and one layer; returns the hash of its tensors."""
    path = folder / "quantizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = QuantizerManifest(
        library_version="1", model=model, weights_sha256="0" * 64, scheme=scheme,
        spec={"kind": "nuq", "bits": 3}, calibration={}, spec_digest=digest, num_layers=1,
        num_kv_heads=2, head_dim=16, calibration_error={},
    )  # fmt: skip
    save_quantizer(path, manifest, [random_quantizer(2, 16, 3, zero=zero)])
    return read_quantizer(path).tensors_sha256
