"""Every path of the GPU kernels at small sizes, for compute-sanitizer (docs/kernels.md)."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_cuda_decode import TOLERANCE, run_case

pytest.importorskip("triton")
from tests.kernels import test_cuda_pack, test_triton_pack
from tests.kernels.test_triton_attention import Case, error

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
    error = run_case(bits, dim, group, size, outliers, torch.float16, lengths)
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
    tests = test_cuda_pack if kernels == "auto" else test_triton_pack
    tests.check(tests.make(2, dim, bits, 0.02), keys.half().to("cuda"), values.half().to("cuda"))


def test_continue() -> None:
    """A ragged past and several new tokens, grouped queries, an empty sequence."""
    case = Case([97, 0, 66], 5, heads=2, group=3, dim=64, dtype=torch.float16)
    assert error(case.attend(2), case.reference()) < 8e-3
