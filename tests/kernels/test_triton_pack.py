"""The packing kernels against the PyTorch path: on a GPU, else under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvquant.formats.blocked_sparse import SparseSlab
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.quantization.batched_quant import BatchedKVQuantizer
from kvquant.quantization.nuq import fit

pytest.importorskip("triton")
from kvquant.kernels.pack_target import PackTarget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts fp32 off to bf16 where a GPU and PyTorch round to the nearest.
KINDS = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def make(heads: int, dim: int, bits: int, outliers: float, seed: int = 0) -> BatchedKVQuantizer:
    generator = torch.Generator().manual_seed(seed)
    tables = LayerQuantizer(
        torch.randn(heads, dim, generator=generator) * 0.2,
        torch.rand(heads, dim, generator=generator) + 2.7,
        fit("nf", bits),
        fit("uniform", bits),
    )
    return BatchedKVQuantizer(tables.to(DEVICE), bits, outliers)


def same_outliers(a: SparseSlab | None, b: SparseSlab | None) -> bool:
    """The same elements; kernels store a block's entries in another order."""
    if a is None or b is None:
        return a is b
    (ai, av), (bi, bv) = a.coordinates(), b.coordinates()
    ao, bo = ai.argsort(), bi.argsort()
    counts = torch.equal(a.count, b.count)
    return counts and torch.equal(ai[ao], bi[bo]) and torch.equal(av[ao], bv[bo])


def check(quantizer: BatchedKVQuantizer, keys: torch.Tensor, values: torch.Tensor) -> None:
    k, v, bad = quantizer.kernel_pack(keys, values) or pytest.fail("not supported")
    key, value = quantizer.pack_keys(keys), quantizer.pack_values(values)
    assert torch.equal(k.codes, key.codes)
    assert torch.equal(v.codes, value.codes)
    assert torch.equal(v.zero, value.zero)
    assert torch.equal(v.scale, value.scale)
    assert same_outliers(k.outliers, key.outliers)
    assert same_outliers(v.outliers, value.outliers)
    assert int(bad) == 0
    for slab in (k.outliers, v.outliers):
        assert slab is None or slab.excess is None or int(slab.excess) == 0


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
    size=st.sampled_from([16, 32]),
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
    x = torch.full((2, 2, 32, 64), fill, dtype=torch.float16, device=DEVICE)
    x[1, :, 3] = 65504.0
    x[1, 0, 4, 5] = -0.0
    k, v, bad = quantizer.kernel_pack(x, x) or pytest.fail("not supported")
    assert int(bad) == 0
    assert torch.equal(quantizer.unpack_values(v, x.shape), quantizer.fake_values(x))
    assert torch.equal(k.codes, quantizer.pack_keys(x).codes)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_not_a_number_is_noticed(wrong: float, where: int) -> None:
    quantizer = make(1, 64, 4, 0.01)
    x = torch.randn(2, 1, 1, 32, 64, device=DEVICE).half()
    x[where, 0, 0, 7, 9] = wrong
    packed = quantizer.kernel_pack(x[0], x[1])
    assert packed is not None
    assert int(packed[2]) == 1


def test_what_finds_no_room_is_counted() -> None:
    quantizer = make(2, 64, 3, 0.01)
    x = torch.full((4, 2, 64, 64), 60000.0, dtype=torch.float16, device=DEVICE)
    packed = quantizer.kernel_pack(x, x)
    assert packed is not None
    outliers = packed[0].outliers
    assert outliers is not None
    assert outliers.excess is not None
    assert int(outliers.excess) == x.numel() - outliers.values.numel()
    assert outliers.nnz == outliers.values.numel()


@pytest.mark.parametrize("slots", [40, 4000])
def test_appends_share_an_arena(slots: int) -> None:
    quantizer = make(2, 64, 3, 0.02)
    x = torch.randn(4, 2, 16, 64, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    room = 16 * 24

    def arena() -> PackTarget:
        return PackTarget(
            torch.zeros((4, 2, room), dtype=torch.uint8, device=DEVICE),
            torch.zeros(2, dtype=torch.int32, device=DEVICE),
            torch.zeros((4, 2), dtype=torch.int32, device=DEVICE),
            torch.zeros((4, 2), dtype=torch.int16, device=DEVICE),
            torch.zeros(slots, dtype=torch.int16, device=DEVICE),
            torch.zeros(slots, dtype=torch.float16, device=DEVICE),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )

    both = arena(), arena()
    zero = torch.zeros((4, 16), dtype=torch.float16, device=DEVICE)
    scale = torch.zeros_like(zero)
    for part in (slice(0, 1), slice(1, 4)):
        key_view, value_view = (
            replace(t, codes=t.codes[part], begin=t.begin[part], count=t.count[part])
            for t in both
            if t.begin is not None and t.count is not None
        )
        assert quantizer.kernel_pack_into(
            x[part], x[part], key_view, value_view, zero[part], scale[part]
        )
    key, value = quantizer.pack_keys(x), quantizer.pack_values(x)
    assert torch.equal(both[0].codes, key.codes)
    assert torch.equal(both[1].codes, value.codes)
    assert torch.equal(zero, value.zero)
    assert torch.equal(scale, value.scale)
    for t, expected in zip(both, (key.outliers, value.outliers), strict=True):
        assert t.begin is not None
        assert t.count is not None
        assert t.positions is not None
        assert t.values is not None
        assert expected is not None
        slab = SparseSlab(t.begin, t.count, t.positions, t.values, (4, 2, 16, 64))
        assert slab.nnz + int(t.status[0]) == expected.nnz
        assert slab.nnz == min(slots, expected.nnz)
        assert int(t.begin.max()) <= slots
        index, kept = slab.coordinates()
        assert torch.equal(x.reshape(-1)[index], kept)
        assert index.unique().numel() == index.numel()
        if not int(t.status[0]):
            assert same_outliers(slab, expected)


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
