"""CQ: nearest centroids of coupled channels, bytes with codebooks, files, refusals.

Also covers: formats.cq_layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.errors import NonFiniteTokens, UserError
from kvquant.formats.cq_layer import CqLayer
from kvquant.quantization.quantizer_file import load_quantizer
from kvquant.schemes.cq import CqCodec
from kvquant.study.schemes import CqScheme
from tests.support.caches import feed, quantized
from tests.support.models import tiny_model
from tests.support.quantizers import (
    assert_fake_is_packed,
    blocks,
    save_made_quantizer,
)

# Codes of 2, 3, 8, 8 and 4 bits; the last three are the paper's 2c8b, 8c8b and one of 16 channels.
SHAPES: list[tuple[int, float]] = [(1, 2.0), (2, 1.5), (2, 4.0), (8, 1.0), (16, 0.25)]


def centroids(width: int, heads: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, 2**width, dim, generator=generator).half().float()


def codec(
    channels: int = 4, bits: float = 1.0, dim: int = 32, heads: int = 2, **options: Any
) -> CqCodec:
    spec = CqScheme(kind="cq", bits=bits, channels=channels, **{"block_size": 32, **options})
    width = int(spec.table_bits)
    tables = (centroids(width, heads, dim, seed) for seed in (0, 1))
    return CqCodec(spec, CqLayer(*tables))


@pytest.mark.parametrize(("channels", "bits"), SHAPES)
def test_a_group_becomes_its_nearest_centroid(channels: int, bits: float) -> None:
    x = blocks(0, (1, 2, 9, 32))
    width = int(bits * channels)
    for seed, found in enumerate(codec(channels, bits).fake(x, x)):
        table = centroids(width, 2, 32, seed).double()
        for head in range(2):
            for first in range(0, 32, channels):
                own = slice(first, first + channels)
                squares = x[0, head, :, None, own].double() - table[head, None, :, own]
                nearest = squares.square().sum(-1).argmin(1)
                assert torch.equal(found[0, head, :, own], table[head, nearest, own].float())


@pytest.mark.parametrize(("channels", "bits"), SHAPES)
def test_packed_is_fake_bit_for_bit(channels: int, bits: float) -> None:
    shape = (3, 2, 32, 32)
    assert_fake_is_packed(codec(channels, bits), blocks(1, shape), blocks(2, shape) * 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_token_is_coded_as_if_alone(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (blocks(3, (5, 2, 32, 32)).float() * 3).to(dtype)
    c = codec(4, 2.0)
    together = c.unpack(c.pack(x, x), (5, 2, 32, 32))
    for block in range(5):
        for token in (0, 7, 31):
            part = x[block : block + 1, :, token : token + 1]
            for mine, all_of_them in zip(c.fake(part, part), together, strict=True):
                assert torch.equal(mine[0, :, 0], all_of_them[block, :, token])
    monkeypatch.setattr("kvquant.schemes.cq.CPU_PIECE", 7 * 2 * 8 * 256)
    again = c.unpack(c.pack(x, x), (5, 2, 32, 32))
    assert all(map(torch.equal, again, together))


@pytest.mark.parametrize(("channels", "bits"), SHAPES)
def test_bytes_are_codes_and_codebooks(channels: int, bits: float) -> None:
    c = codec(channels, bits)
    packed = c.pack(blocks(4, (5, 2, 32, 32)), blocks(5, (5, 2, 32, 32)))
    elements = 2 * 5 * 2 * 32 * 32
    assert packed.nbytes * 8 == elements * bits
    # Two fp16 tables with as many rows as there are codes, each as long as a token.
    assert c.shared_bytes == 2 * 2 ** int(bits * channels) * 2 * 32 * 2


def test_codebooks_of_8_bits_count_as_256_tokens_of_16_bits() -> None:
    """As the docstring of the scheme says."""
    spec = CqScheme(kind="cq", bits=4.0, channels=2, block_size=64)
    ids = torch.randint(1, 97, (1, 512), generator=torch.Generator().manual_seed(8))
    _, cache = feed(quantized(tiny_model(), spec), ids, None, [512])
    per_token = 2 * 2 * 2 * 16  # elements: layers, keys and values, heads, channels
    assert cache_elements(cache) == 512 * per_token
    tail = 64  # places for tokens of the next block
    assert cache_nbytes(cache) == 512 * per_token * 4 // 8 + (256 + tail) * per_token * 2


def test_keys_are_coded_before_rope_and_no_token_is_kept_by_default() -> None:
    c = codec()
    assert not c.rotated_keys and (c.sinks, c.residual) == (0, 0)


def test_numbers_beyond_fp16_have_the_code_of_its_largest() -> None:
    x = torch.full((1, 2, 3, 32), 3e38, dtype=torch.bfloat16)
    largest = torch.full((1, 2, 3, 32), 65504.0, dtype=torch.float16)
    c = codec()
    assert all(map(torch.equal, c.fake(x, -x), c.fake(largest, -largest)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_has_no_nearest_centroid(bad: float) -> None:
    x = blocks(6, (1, 2, 32, 32))
    spoiled = x.clone()
    spoiled[0, 1, 5, 7] = bad
    c = codec()
    for call in (c.pack, c.fake):
        with pytest.raises(NonFiniteTokens, match="values"):
            call(x, spoiled)
        with pytest.raises(NonFiniteTokens, match="keys"):
            call(spoiled, x)


def test_names_of_the_publication() -> None:
    for channels, width, bits in ((2, 8, 4.0), (4, 8, 2.0), (8, 8, 1.0)):
        spec = CqScheme(kind="cq", bits=bits, channels=channels)
        assert spec.table_bits == width and spec.nominal_bits == bits
    spec = CqScheme(kind="cq")
    assert (spec.bits, spec.channels, spec.sinks, spec.residual) == (2.0, 4, 0, 0)
    assert spec.sampled_tokens == 4096


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4.0}, "bits: 4 times channels 4 is 16 bits per code"),
        ({"bits": 1.1}, "bits: 1.1 times channels 4 is 4.4 bits per code"),
        ({"bits": 1.25, "channels": 8}, "10 bits per code, which must be a whole number from 1"),
        ({"channels": 3}, "channels"),
        ({"samples": 10}, "samples"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CqScheme(kind="cq", **options)


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="made for 2 kv heads of 32, the model has 4 of 32"):
        codec().check_model(4, 32)
    with pytest.raises(UserError, match="channels: 16 does not divide the head_dim 24"):
        codec(16, 0.25, dim=24)


def test_files_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quantizer.json"
    spec = CqScheme(kind="cq", bits=1.5, channels=4)
    layers = [CqLayer(centroids(6, 2, 16, i), centroids(6, 2, 16, i + 9)) for i in range(2)]
    save_made_quantizer(path, spec, "w", layers)
    _, again = load_quantizer(path, weights_sha256="w")
    assert isinstance(again[1], CqLayer)
    assert torch.equal(again[1].key_centroids, layers[1].key_centroids)
    assert again[1].nbytes == 2 * 4 * 2 * 64 * 16
    for table, message in (
        (centroids(5, 2, 16, 0), "has shape"),
        (centroids(6, 2, 16, 0) + 1e-6, r"layers\.0\.value_centroids holds numbers that fp16"),
        (centroids(6, 2, 16, 0) * 1e6, r"layers\.0\.value_centroids holds numbers that fp16"),
    ):
        spoiled = [CqLayer(layer.key_centroids, table.clone()) for layer in layers]
        save_made_quantizer(path, spec, "w", spoiled)
        with pytest.raises(UserError, match=message):
            load_quantizer(path, weights_sha256="w")
