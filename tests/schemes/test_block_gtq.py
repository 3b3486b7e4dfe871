"""Block-GTQ: bytes by formula, packed is fake, energetic pairs lose less, files are checked.

Also covers: formats.block_gtq_layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from kvquant.errors import UserError
from kvquant.formats.block_gtq_layer import BlockGtqLayer
from kvquant.formats.tensor_file import read_info
from kvquant.quantization.quantizer_file import load_quantizer, tensors_path
from kvquant.schemes.block_gtq import BlockGtqCodec
from kvquant.study.schemes import BlockGtqScheme
from tests.support.quantizers import (
    assert_fake_is_packed,
    blocks,
    relative_error,
    save_made_quantizer,
)

WIDTHS = torch.tensor([[4.0] * 8 + [2.0] * 8, [5.0] * 2 + [3.0] * 12 + [1.0] * 2])


def scheme(**options: Any) -> BlockGtqScheme:
    return BlockGtqScheme(kind="block-gtq", **{"block_size": 32, **options})


def codec(**options: Any) -> BlockGtqCodec:
    return BlockGtqCodec(scheme(**options), BlockGtqLayer(WIDTHS))


@pytest.mark.parametrize("value_bits", [2, 3, 4])
def test_packed_is_fake_bit_for_bit(value_bits: int) -> None:
    shape = (3, 2, 32, 32)
    c = codec(value_bits=value_bits)
    assert_fake_is_packed(c, blocks(0, shape), blocks(1, shape) * 5)


def test_bytes_are_codes_and_a_norm_per_group() -> None:
    """Widths of 3 bits in the mean: 2 and 3 groups of keys, one of values per head."""
    x = blocks(2, (3, 2, 32, 32))
    packed = codec(value_bits=2).pack(x, x)
    elements = x.numel()
    keys = packed.dense["keys"].nbytes + packed.dense["keys_norm"].nbytes
    values = packed.dense["values"].nbytes + packed.dense["values_norm"].nbytes
    assert 8 * keys == elements * (3 + 16 * (2 + 3) / 2 / 32)
    assert 8 * values == elements * (2 + 16 / 32)
    assert packed.nbytes == keys + values


def test_more_bits_go_where_widths_say() -> None:
    x = blocks(3, (4, 2, 32, 32))
    keys, _ = codec().fake(x[:1], x[:1])
    wide = torch.tensor([*range(8), *range(16, 24)])
    narrow = torch.tensor([*range(8, 16), *range(24, 32)])
    errors = [relative_error(keys[:, 0][..., c], x[:1, 0][..., c]) for c in (wide, narrow)]
    assert errors[0] < errors[1] / 8


def test_rotations_follow_the_seed() -> None:
    x = blocks(4, (1, 2, 32, 32))
    one, same, other = (codec(seed=seed).fake(x, x) for seed in (0, 0, 1))
    for k in range(2):
        assert torch.equal(one[k], same[k]) and not torch.equal(one[k], other[k])


def test_options_of_the_publication() -> None:
    """K2V2, K3V2 and K3V3 without any 16-bit token."""
    spec = BlockGtqScheme(kind="block-gtq")
    assert (spec.bits, spec.width_of_values, spec.sinks, spec.residual) == (3.0, 3, 0, 0)
    assert (spec.min_width, spec.max_width) == (1, 8)
    assert scheme(bits=3, value_bits=2).nominal_bits == 2 and scheme(bits=2).width_of_values == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2.5}, "value_bits: must be given"),
        ({"bits": 3, "max_width": 2}, "bits: 3 is not between min_width 1 and max_width 2"),
        ({"bits": 9}, "bits"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        scheme(**options)


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="made for 2 kv heads of 32, the model has 4 of 32"):
        codec().check_model(4, 32)
    with pytest.raises(UserError, match="head_dim: 512 is more than 256"):
        codec().check_model(2, 512)


def test_files_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quantizer.json"
    layers = [BlockGtqLayer(WIDTHS[:, :8].clone()) for _ in range(2)]
    save_made_quantizer(path, scheme(), "w", layers)
    with pytest.raises(UserError, match=r"layers\.0\.key_widths has heads of unequal bits"):
        load_quantizer(path, weights_sha256="w")
    for widths, message in (
        (torch.full((2, 8), 2.5), "layers.0.key_widths holds other numbers than 1 to 8"),
        (torch.full((2, 8), 9.0), "layers.0.key_widths holds other numbers than 1 to 8"),
        (torch.full((2, 7), 3.0), "key_widths"),
    ):
        save_made_quantizer(path, scheme(), "w", [BlockGtqLayer(widths.clone()) for _ in range(2)])
        with pytest.raises(UserError, match=message):
            load_quantizer(path, weights_sha256="w")
    good = torch.tensor([[2.0, 4.0] * 4, [3.0] * 8])
    save_made_quantizer(path, scheme(), "w", [BlockGtqLayer(good), BlockGtqLayer(good.flip(0))])
    _, again = load_quantizer(path, weights_sha256="w")
    assert isinstance(again[1], BlockGtqLayer) and torch.equal(again[1].key_widths, good.flip(0))
    assert set(load_file(tensors_path(path))) == {f"layers.{i}.key_widths" for i in range(2)}
    assert read_info(path, "x", "y")["spec"]["kind"] == "block-gtq"
