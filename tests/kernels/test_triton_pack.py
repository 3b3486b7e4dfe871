"""The packing kernels against the PyTorch path: on a GPU, else under Triton's interpreter.

Also covers: kernels.pack_target.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvquant.quantization.batched_quant import BatchedKVQuantizer

pytest.importorskip("triton")
from tests.support.packing import check_packed, check_shared_arena
from tests.support.quantizers import random_quantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A program packs the values of one token, for which the interpreter takes a tenth of a second: few
# tokens run every branch.
SIZES = [16, 32] if DEVICE == "cuda" else [4, 8]
# The interpreter cuts fp32 off to bf16 where a GPU and PyTorch round to the nearest.
KINDS = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def make(heads: int, dim: int, bits: int, outliers: float, seed: int = 0) -> BatchedKVQuantizer:
    tables = random_quantizer(heads, dim, bits, scale=(2.7, 3.7), values="uniform", seed=seed)
    return BatchedKVQuantizer(tables.to(DEVICE), bits, outliers)


def check(quantizer: BatchedKVQuantizer, keys: torch.Tensor, values: torch.Tensor) -> None:
    assert check_packed(quantizer, keys, values) == 0


@pytest.fixture(autouse=True)
def demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", "triton")


# The interpreter takes seconds an example; hypothesis's tracing would multiply that.
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    bits=st.sampled_from([2, 3, 4]),
    outliers=st.sampled_from([0.0, 0.01, 0.02]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([64, 80, 128]),
    size=st.sampled_from(SIZES),
    kind=st.sampled_from(KINDS),
    coarse=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equal_to_pytorch(
    bits: int,
    outliers: float,
    heads: int,
    dim: int,
    size: int,
    kind: torch.dtype,
    coarse: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # tokens first in memory, as a projection leaves them
    x = torch.randn(2, 1, size, heads, dim, generator=generator)
    if coarse:  # many ties
        x = (x * 2).round() / 2
    x = x.to(kind).to(DEVICE).transpose(2, 3)
    check(make(heads, dim, bits, outliers, seed), x[0], x[1])


@pytest.mark.parametrize("fill", [0.0, 1.5, -65504.0])
def test_constant_and_extreme_input(fill: float) -> None:
    quantizer = make(2, 64, 3, 0.02)
    x = torch.full((1, 2, SIZES[1], 64), fill, dtype=torch.float16, device=DEVICE)
    x[0, :, 3] = 65504.0
    x[0, 0, 4, 5] = -0.0
    k, v, bad = quantizer.kernel_pack(x, x) or pytest.fail("not supported")
    assert int(bad) == 0
    assert torch.equal(quantizer.unpack_values(v, x.shape), quantizer.fake_values(x))
    assert torch.equal(k.codes, quantizer.pack_keys(x).codes)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_not_a_number_is_noticed(wrong: float, where: int) -> None:
    quantizer = make(1, 64, 4, 0.01)
    x = torch.randn(2, 1, 1, SIZES[0], 64, device=DEVICE).half()
    x[where, 0, 0, 3, 9] = wrong
    packed = quantizer.kernel_pack(x[0], x[1])
    assert packed is not None
    assert int(packed[2]) == 1


def test_what_finds_no_room_is_counted() -> None:
    quantizer = make(2, 64, 3, 0.01)
    x = torch.full((2, 2, SIZES[0], 64), 60000.0, dtype=torch.float16, device=DEVICE)
    packed = quantizer.kernel_pack(x, x)
    assert packed is not None
    outliers = packed[0].outliers
    assert outliers is not None
    assert outliers.excess is not None
    assert int(outliers.excess) == x.numel() - outliers.values.numel()
    assert outliers.nnz == outliers.values.numel()


@pytest.mark.parametrize("slots", [40, 4000])
def test_appends_share_an_arena(slots: int) -> None:
    check_shared_arena(make(2, 64, 3, 0.02), SIZES[0], slots)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: minutes in the interpreter")
@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "coarse", "one head", "constant tokens"])
def test_whole_layers_on_a_gpu(heads: int, bits: int, kind: str) -> None:
    torch.manual_seed(heads)
    x = torch.randn(2, 5, 64, heads, 128)
    if kind == "coarse":
        x = (x * 2).round() / 2
    elif kind == "one head":
        x[..., 3, :] *= 50
    elif kind == "constant tokens":
        x[:, :, ::3] = 0.5
    quantizer = make(heads, 128, bits, 0.01)
    keys, values = x.half().cuda().transpose(2, 3)
    if kind == "one head":  # more outliers than a slab has room for: told, not compared
        keys = keys.clamp(-2.5, 2.5)
    check(quantizer, keys, values)
