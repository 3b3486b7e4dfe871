"""WUSH-KV: the clipped quantizer, exact transforms, bytes, files.

Also covers: formats.wush_layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.formats.wush_layer import WushLayer
from kvquant.quantization.quantizer_file import load_quantizer
from kvquant.quantization.wush_transform import wush_transform
from kvquant.schemes.wush_kv import WushKvCodec, best_range
from kvquant.study.schemes import WushKvScheme
from tests.support.quantizers import (
    assert_fake_is_packed,
    blocks,
    relative_error,
    save_made_quantizer,
)

# Step of the best uniform quantizer of a standard normal variable, and its mean squared error
# (Max, IRE Transactions on Information Theory 6, 1960, table II).
STEPS = {2: (0.9957, 0.1188), 3: (0.5860, 0.03744), 4: (0.3352, 0.01154)}


def transforms(heads: int, dim: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def moments() -> torch.Tensor:
        x = torch.randn(4 * dim, dim, generator=generator, dtype=torch.float64)
        x *= torch.randn(dim, generator=generator, dtype=torch.float64).mul(spread).exp()
        return x.mT @ x

    return torch.stack([wush_transform(moments(), moments(), 0.01) for _ in range(heads)]).float()


def codec(dim: int = 32, **options: Any) -> WushKvCodec:
    spec = WushKvScheme(kind="wush-kv", **{"bits": 3, "block_size": 32, **options})
    return WushKvCodec(spec, WushLayer(transforms(2, dim, 0), transforms(2, dim, 1)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_range_is_that_of_the_best_uniform_quantizer(bits: int) -> None:
    assert 2 * best_range(bits) / (2**bits - 1) == pytest.approx(STEPS[bits][0], rel=1e-3)


def naive(x: torch.Tensor, transform: torch.Tensor, bits: int) -> torch.Tensor:
    """Equation 5 of the paper for one token and head, in double precision."""
    y = transform.double() @ x.double()
    step = 2 * best_range(bits) / (2**bits - 1) * len(y) ** -0.5 * y.norm()
    half = 2 ** (bits - 1)
    levels = step * ((y / step).floor().clamp(-half, half - 1) + 0.5)
    return torch.linalg.inv(transform.double()) @ levels


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tokens_are_coded_as_the_paper_says(bits: int) -> None:
    """But for elements at the edge of a bin, which roundings of the 16-bit tables may move."""
    x = blocks(0, (4, 2, 32, 32))
    found = codec(bits=bits, value_bits=bits).fake(x[:1], x[:1])
    for y, seed in zip(found, (0, 1), strict=True):
        table, near = transforms(2, 32, seed), 0
        for head in range(2):
            for token in range(32):
                wanted = naive(x[0, head, token], table[head], bits)
                error = (y[0, head, token].double() - wanted).norm() / wanted.norm()
                near += int(error < 3e-3)
        assert near >= 55


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [16, 96])
def test_packed_is_fake_bit_for_bit(bits: int, dim: int) -> None:
    shape = (3, 2, 32, dim)
    c = codec(dim, bits=bits, value_bits=2)
    assert_fake_is_packed(c, blocks(1, shape), blocks(2, shape) * 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_token_is_coded_as_if_alone(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (blocks(3, (5, 2, 32, 32)).float() * 3).to(dtype)
    c = codec()
    together = c.unpack(c.pack(x, x), (5, 2, 32, 32))
    for block in range(5):
        for token in (0, 7, 31):
            part = x[block : block + 1, :, token : token + 1]
            for mine, all_of_them in zip(c.fake(part, part), together, strict=True):
                assert torch.equal(mine[0, :, 0], all_of_them[block, :, token])
    monkeypatch.setattr("kvquant.schemes.wush_kv.PIECE", 2 * x[0].numel())
    again = c.unpack(c.pack(x, x), (5, 2, 32, 32))
    assert all(map(torch.equal, again, together))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_hadamard_matrix_gives_the_error_of_the_uniform_quantizer(bits: int) -> None:
    unit = torch.eye(64).double()
    table = wush_transform(unit, unit, 0.01).float().expand(2, -1, -1)
    c = WushKvCodec(WushKvScheme(kind="wush-kv", bits=bits), WushLayer(table, table))
    x = blocks(4, (1, 2, 512, 64))
    for found in c.fake(x, x):
        assert relative_error(found, x) == pytest.approx(STEPS[bits][1], rel=0.1)


def test_bytes_are_codes_steps_and_tables_of_16_bits() -> None:
    x = blocks(5, (3, 2, 32, 32))
    c = codec(bits=3, value_bits=2)
    assert 8 * c.pack(x, x).nbytes == x.numel() * (3 + 2 + 2 * 16 / 32)
    assert c.shared_bytes == 4 * 2 * (32 * 32 * 2 + 8)


def test_zeros_and_huge_tokens_stay_finite() -> None:
    c = codec()
    zeros = torch.zeros(1, 2, 32, 32).half()
    assert not any(y.any() for y in c.fake(zeros, zeros))
    huge = (blocks(6, (1, 2, 32, 32)).float() * 1e30).bfloat16()
    assert all(bool(y.isfinite().all()) for y in c.fake(huge, huge))


def test_published_options_are_the_defaults() -> None:
    spec = WushKvScheme(kind="wush-kv", bits=2)
    assert (spec.damping, spec.sinks, spec.residual, spec.block_size) == (0.01, 16, 128, 16)
    assert WushKvScheme(kind="wush-kv", bits=4, value_bits=2).nominal_bits == 3


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="made for 2 kv heads of 32, the model has 4 of 32"):
        codec().check_model(4, 32)
    with pytest.raises(UserError, match="head_dim: 512 is more than 256"):
        codec().check_model(2, 512)
    with pytest.raises(UserError, match="no Hadamard rotation of 72"):
        codec().check_model(2, 72)


def test_files_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path, spec = tmp_path / "quantizer.json", WushKvScheme(kind="wush-kv", bits=3)
    layers = [WushLayer(transforms(2, 16, n), transforms(2, 16, n + 5)) for n in range(2)]
    save_made_quantizer(path, spec, "w", layers)
    _, again = load_quantizer(path, weights_sha256="w")
    assert isinstance(again[1], WushLayer)
    assert torch.equal(again[1].value_transform, layers[1].value_transform)
    layers[1].key_transform[1, 3] = 0.0
    save_made_quantizer(path, spec, "w", layers)
    message = r"layers\.1\.key_transform has a matrix that cannot be undone"
    with pytest.raises(UserError, match=message):
        load_quantizer(path, weights_sha256="w")
    layers[1] = WushLayer(torch.zeros(2, 16, 16), layers[1].value_transform)
    save_made_quantizer(path, spec, "w", layers)
    with pytest.raises(UserError, match=message):
        load_quantizer(path, weights_sha256="w")
