"""Every path of the GPU kernels at small sizes, for compute-sanitizer (docs/kernels.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.quantization.batched_quant import BatchedKVQuantizer
from kvquant.schemes.allocated import AllocatedCodec
from kvquant.study.schemes import AllocatedScheme
from tests.support.decode_case import TOLERANCE, allocated_case, decode_error
from tests.support.packing import check_packed, same_outliers
from tests.support.past_case import PastCase, largest_error
from tests.support.quantizers import random_allocated, random_quantizer

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("bits", "dim", "group", "size", "outliers"),
    [(3, 128, 4, 64, 0.02), (2, 64, 1, 32, 0.01), (4, 256, 8, 128, 0.0)],
)
def test_decode(bits: int, dim: int, group: int, size: int, outliers: float) -> None:
    """No block, a tail that is nearly full, several splits, two arenas."""
    lengths = [(0, 1), (1, size - 1), (3 if size == 128 else 18, 2)]
    error = decode_error(bits, dim, group, size, outliers, torch.float16, lengths)
    assert error < TOLERANCE[torch.float16]


def test_decode_with_caps_and_sinks() -> None:
    more: dict[str, Any] = {"soft_cap": 1.5, "learned": True}
    error = decode_error(3, 64, 8, 64, 0.02, torch.float16, [(0, 1), (18, 2)], **more)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "constant tokens", "coarse"])
@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_pack(bits: int, kind: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads, ties and tokens without a range; for Triton also masked lanes (head_dim 80)."""
    monkeypatch.setenv("KVQUANT_KERNELS", kernels)
    dim = 80 if bits == 3 and kernels == "triton" else 128
    generator = torch.Generator().manual_seed(bits)
    keys, values = torch.randn(2, 3, 2, 32, dim, generator=generator)
    if kind == "constant tokens":
        values[:, :, ::3] = 0.25
    if kind == "coarse":
        keys, values = (2 * keys).round() / 2, (2 * values).round() / 2
    tables = random_quantizer(2, dim, bits, scale=(2.7, 3.7), values="uniform")
    if kernels == "auto":
        tables.key_scale[0, :3] = 0.0  # constant channels
    quantizer = BatchedKVQuantizer(tables.to("cuda"), bits, 0.02)
    check_packed(quantizer, keys.half().to("cuda"), values.half().to("cuda"))


@pytest.mark.parametrize("value_range", ["token", "token-head"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_pack_allocated(
    value_range: Any, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads whose tiles have all widths, blocks of one and of two chunks."""
    for size in (64, 128):
        options: dict[str, Any] = {"block_size": size, "value_range": value_range}
        spec = AllocatedScheme(kind="allocated", outliers=0.01, **options)
        layer = random_allocated(3, dim, scale=(2.5, 3.5), seed=dim).to("cuda")
        codec = AllocatedCodec(spec, layer)
        keys, values = torch.randn(2, 2, 3, size, dim, device="cuda").to(dtype)
        found = []
        for kernels in ("auto", "pytorch"):
            monkeypatch.setenv("KVQUANT_KERNELS", kernels)
            found.append(codec.pack(keys, values))
        for name, t in found[0].dense.items():
            assert torch.equal(t, found[1].dense[name])
        assert same_outliers(found[0].sparse["keys"], found[1].sparse["keys"])


@pytest.mark.parametrize(("dim", "group", "size"), [(128, 4, 64), (64, 1, 128), (256, 8, 64)])
def test_decode_allocated(dim: int, group: int, size: int) -> None:
    made = allocated_case(dim, group, size, 0.01, torch.float16)
    lengths = [(0, 1), (1, size - 1), (9, 2)]
    error = decode_error(3, dim, group, size, 0.01, torch.float16, lengths, made=made)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_continue_allocated(dim: int) -> None:
    made = allocated_case(dim, 3, 64, 0.01, torch.float16)
    case = PastCase([197, 1, 66], 5, heads=2, group=3, dim=dim, size=64, codec=made[0])
    assert largest_error(case.attend(2), case.reference()) < 8e-3


def test_continue() -> None:
    """A ragged past and several new tokens, grouped queries, an empty sequence."""
    for more in ({}, {"soft_cap": 0.8, "learned": True}):
        options: Any = {"heads": 2, "group": 3, "dim": 64, "dtype": torch.float16, **more}
        case = PastCase([97, 0, 66], 5, **options)
        assert largest_error(case.attend(2), case.reference()) < 8e-3
