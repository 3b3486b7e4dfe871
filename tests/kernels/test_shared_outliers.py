"""Outliers of a token whose heads processes share: found together, and kept in a kernel's arena.

`tests/models/test_tensor_parallel.py` has several processes; here one has all heads.
"""

from __future__ import annotations

import pytest
import torch

from kvquant.errors import NonFiniteTokens
from kvquant.kernels import shared_outliers
from kvquant.kernels.pytorch_fused import split_outliers
from kvquant.kernels.shared_outliers import split_shared_outliers
from tests.support.head_codes import Alone, kernel_codes, outlier_rows


@pytest.mark.parametrize("side", [0, 1, 5, 15, 16])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_one_process_finds_its_own(
    side: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_outliers, "PIECE", 100)  # three rows at a time
    rows = outlier_rows().to(kind)
    found = split_shared_outliers(rows, side, Alone())
    for part, expected in zip(found, split_outliers(rows, side), strict=True):
        assert part.dtype is expected.dtype
        assert torch.equal(part, expected)


def test_words_are_compared_as_unsigned() -> None:
    seen: list[list[int]] = []

    class Told(Alone):
        def largest(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.tolist())
            return x

    words = torch.tensor([0, 1, -1, -(2**31)], dtype=torch.int32)  # 0, 1, largest, middle
    assert Told().largest_words(words).tolist() == [0, 1, -1, -(2**31)]
    assert seen == [[-(2**31), 1 - 2**31, 2**31 - 1, 0]]


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_values_that_pytorch_packs_are_in_the_arena_of_the_kernels(
    outliers: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two appends into one arena, as kernels of all heads leave it."""
    pytest.importorskip("triton")
    from kvquant.quantization.batched_quant import BatchedKVQuantizer
    from tests.support.packing import check_packed, check_shared_arena
    from tests.support.quantizers import random_quantizer

    monkeypatch.setenv("KVQUANT_KERNELS", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables = random_quantizer(2, 64, 3, scale=(2.7, 3.7), values="uniform").to(device)
    quantizer = BatchedKVQuantizer(tables, 3, outliers)
    quantizer.share = Alone()
    keys, values = (
        torch.randn(2, 2, 8, 64, generator=torch.Generator().manual_seed(seed)).half().to(device)
        for seed in (1, 2)
    )
    assert check_packed(quantizer, keys, values) == 0
    if outliers:
        check_shared_arena(quantizer, 8, 400)
    values[1, 1, 3, 7] = float("inf")
    if device == "cpu":
        with pytest.raises(NonFiniteTokens, match=r"^values: NaN or Inf"):
            quantizer.kernel_pack(keys, values)
        return
    packed = quantizer.kernel_pack(keys, values)
    assert packed is not None and int(packed[2]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_find_ranges_in_two_launches() -> None:
    """Between them, processes would tell each other the ends of their heads."""
    for mine, every in zip(kernel_codes(Alone()), kernel_codes(None), strict=True):
        for x, expected in zip(mine, every, strict=True):
            assert torch.equal(x, expected)
