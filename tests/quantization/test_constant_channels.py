"""Empty ranges: what differs from a constant is kept exactly, and the constant costs nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.cache.block_store import BlockStore
from kvquant.cache.layout import Layout
from kvquant.calibration.build import build_layer
from kvquant.calibration.statistics import LayerStatistics
from kvquant.errors import UserError
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels import reference
from kvquant.quantization.batched_quant import BatchedKVQuantizer
from kvquant.quantization.nuq import fit
from kvquant.schemes.kvquant_store import ReferenceTables, SequenceStore
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import KvquantRefScheme, NuqScheme
from tests.kernels.emulate import emulate
from tests.support.quantizers import token_major

SPEC = NuqScheme(kind="nuq", bits=3, outliers=0.01)
CONSTANTS = [0.0, 0.3, -7.7, 100.0, 1e-5, -3e-7, 50000.0, 0.015625]


def tables(scale: list[float], zero: list[float], bits: int = 3) -> LayerQuantizer:
    shape = (1, len(scale))
    return LayerQuantizer(
        torch.tensor(zero).view(shape),
        torch.tensor(scale).view(shape),
        fit("nf", bits),
        fit("nf", bits),
    )


def channels(values: list[float], n: int, seed: int = 0) -> torch.Tensor:
    """`[n, channels]`: as many constant channels, then as many that vary."""
    noise = torch.randn(n, len(values), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.tensor(values).expand(n, -1), noise], 1)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    scales=st.lists(
        st.sampled_from([0.0, -0.0, 1e-45, 1e-40, 1e-30, 3e-8, 1e-4, 2.0]), min_size=8, max_size=8
    ),
    kind=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_keys_outside_any_range_come_back_exactly(
    bits: int, scales: list[float], kind: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randn(8, generator=generator).to(kind).float()
    quantizer = BatchedKVQuantizer(tables(scales, zero.tolist(), bits), bits, 0.01)
    x = torch.randn(2, 1, 8, 8, generator=generator).to(kind)
    x[:, :, ::2] = zero.to(kind)
    got, scale = quantizer.fake_keys(x), quantizer.tables.key_scale
    packed = quantizer.pack_keys(x)
    assert torch.equal(quantizer.unpack_keys(packed, x.shape), got)
    outside = (x.float() - zero).abs() > scale * (1 + 1e-6)
    assert torch.equal(got[outside], x.float()[outside])
    assert torch.all((got - x.float()).abs() <= 2.01 * scale)
    # the constant itself takes no room
    assert packed.outliers is not None
    assert packed.outliers.nnz <= int((x.float() != zero).sum())
    t = quantizer.tables
    expected = reference.quantize_keys(
        token_major(x), t.key_zero.view(-1), t.key_scale.view(-1), t.key_levels, True
    )
    assert torch.equal(token_major(got), expected)


@pytest.mark.fault(
    "library",
    "a key channel constant in calibration that varies later",
    "exact, as outliers",
)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["none", "fisher-range2"])
def test_channels_that_were_constant_in_calibration(kind: torch.dtype, weighting: str) -> None:
    """From the histograms on: the constant is no outlier, all else in its channel is one."""
    n = len(CONSTANTS)
    values = torch.tensor(CONSTANTS).to(kind).float().tolist()
    statistics = LayerStatistics.from_first(channels(values, 500), 1024, 1, 1)
    for seed in range(3):
        window = channels(values, 500, seed)
        statistics.add_keys(window, torch.ones_like(window))
        statistics.add_values(window, torch.ones_like(window), [0.01])
    spec = SPEC.model_copy(update={"weighting": weighting})
    made, _, _ = build_layer(statistics, spec, [0.01], 1)
    quantizer = BatchedKVQuantizer(made, 3, 0.01)
    x = channels(values, 32, 9).to(kind).view(1, 1, 32, 2 * n)
    packed = quantizer.pack_keys(x)
    assert packed.outliers is not None
    index, _ = packed.outliers.coordinates()
    assert torch.all(index % (2 * n) >= n)
    got = quantizer.unpack_keys(packed, x.shape)[..., :n]
    torch.testing.assert_close(got, x[..., :n].float(), atol=1e-8, rtol=2e-6)
    x[:, :, 5, :n] += 1.0
    x[:, :, 6, :n] = x[:, :, 6, :n] * 1.125 + 2.0**-20
    differs = x[..., :n] != torch.tensor(values).to(kind)
    assert int(differs.sum()) >= 2 * n - 1
    assert torch.equal(quantizer.fake_keys(x)[..., :n][differs], x[..., :n].float()[differs])
    # other channels are coded as if the constant ones were not there
    alone = LayerStatistics.from_first(channels(values, 500)[:, n:], 1024, 1, 1)
    for seed in range(3):
        window = channels(values, 500, seed)[:, n:]
        alone.add_keys(window, torch.ones_like(window))
        alone.add_values(window, torch.ones_like(window), [0.01])
    assert torch.equal(build_layer(alone, spec, [0.01], 1)[0].key_levels, made.key_levels)


def test_a_channel_that_moves_in_a_later_window() -> None:
    """Constant in the first window only: 0.4 % of other values stay outliers, the rest has room."""
    first = torch.full((500, 2), 3.0)
    first[:, 1] = torch.linspace(-1, 1, 500)
    later = first.clone()
    later[:4, 0] = torch.tensor([1.0, 9.0, -20.0, 3.5])
    statistics = LayerStatistics.from_first(first, 1024, 1, 1)
    for window in (first, later):
        statistics.add_keys(window, torch.ones_like(window))
        statistics.add_values(window, torch.ones_like(window), [0.01])
    made, _, _ = build_layer(statistics, SPEC, [0.01], 1)
    quantizer = BatchedKVQuantizer(made, 3, 0.01)
    x = later[:8, None].half().view(1, 1, 8, 2)
    got = quantizer.fake_keys(x)[..., 0].view(-1)
    assert torch.equal(got[:3], torch.tensor([1.0, 9.0, -20.0]))
    assert torch.all((got[3:] - x[0, 0, 3:, 0].float()).abs() <= 2 * made.key_scale[0, 0])


def test_a_layer_of_constants_has_a_quantizer() -> None:
    window = torch.tensor([[1.0, -2.0, 0.0, 5.0]]).expand(100, -1)
    statistics = LayerStatistics.from_first(window, 1024, 1, 1)
    statistics.add_keys(window, torch.ones_like(window))
    statistics.add_values(window, torch.ones_like(window), [0.01])
    made, error, _ = build_layer(statistics, SPEC, [0.01], 1)
    assert error == 0.0
    x = window[:32].half().view(1, 1, 32, 4).clone()
    x[0, 0, 7] = 9.0
    torch.testing.assert_close(BatchedKVQuantizer(made, 3, 0.01).fake_keys(x), x.float())


@pytest.mark.fault(
    "library",
    "a constant channel without room for outliers",
    "refused when the quantizer is built",
)
def test_without_outliers_a_constant_channel_is_refused() -> None:
    window = channels([2.0], 300)
    statistics = LayerStatistics.from_first(window, 1024, 1, 1)
    statistics.add_keys(window, torch.ones_like(window))
    statistics.add_values(window, torch.ones_like(window), [0.0])
    with pytest.raises(UserError, match="outliers: 0, but 1 key channels of a layer were constant"):
        build_layer(statistics, SPEC.model_copy(update={"outliers": 0.0}), [0.0], 1)


def test_sensitivities_of_zero_are_refused() -> None:
    window = channels([2.0], 300)
    statistics = LayerStatistics.from_first(window, 1024, 1, 1)
    statistics.add_keys(window, torch.zeros_like(window))
    statistics.add_values(window, torch.ones_like(window), [0.01])
    with pytest.raises(UserError, match="weighting: 'fisher-range2', but all gradients"):
        build_layer(statistics, SPEC, [0.01], 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("key_scale", float("nan")), ("key_scale", float("inf")), ("key_zero", float("nan")),
     ("key_levels", float("inf")), ("value_levels", float("nan")), ("key_scale", -1.0)],
)  # fmt: skip
def test_ranges_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    made = tables([1.0] * 8, [0.0] * 8)
    getattr(made, name).view(-1)[3] = value
    with pytest.raises(ValueError, match=f"{name}: .*calibrate again"):
        BatchedKVQuantizer(made, 3, 0.01)


@pytest.mark.fault(
    "library",
    "more outliers than there is room for",
    "counted and reported",
)
def test_more_than_the_room_for_outliers_is_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head whose channels were all constant in calibration, packed where nobody waits."""
    monkeypatch.setenv("KVQUANT_KERNELS", "auto")
    emulate(monkeypatch)
    codec = NuqCodec(SPEC.model_copy(update={"block_size": 32}), tables([0.0] * 64, [1.0] * 64))
    keys = torch.ones(1, 1, 97, 64).half()
    values = torch.randn(1, 1, 97, 64, generator=torch.Generator().manual_seed(0)).half()

    def fill(x: torch.Tensor) -> tuple[list[int], torch.Tensor, int]:
        store, layout = BlockStore(codec), Layout(codec.sinks, 32, 0)
        store.append(layout.append([slice(0, 97)]), x, values)
        assert store.status is not None and store.arenas[0].reserved
        back = torch.cat([store.unpack(a, slice(p, p + 1))[0] for a, p in layout.table[0]], 2)
        return (
            store.status.tolist(),
            back,
            sum(s.nnz for s in store.outliers("keys", layout.table[0])),
        )

    status, back, number = fill(keys)
    assert status == [0, 0] and number == 0 and torch.all(back == 1.0)
    keys[:, :, 10:20, :5] = 1.5
    status, back, number = fill(keys)
    assert status == [0, 0] and number == 50
    assert torch.equal(back, keys[:, :, 1:].float())
    keys += 0.5
    status, _, number = fill(keys)
    assert status[0] == 96 * 64 - number > 0


def test_kvquants_own_procedure_keeps_them_too() -> None:
    spec = KvquantRefScheme(kind="kvquant-ref", bits=3, outliers=0.01, sinks=0)
    made = tables([0.0, 2.0] * 4, [1.0, 0.0] * 4)
    store = SequenceStore(ReferenceTables(spec, made), torch.zeros(1, 6, 8).half())
    x = torch.ones(1, 6, 8).half()
    x[0, 3, ::2] = 1.75
    store.append(x, x, x)
    ((first, keys, _, rotated),) = store.pieces()
    assert first == 0 and not rotated
    assert torch.equal(keys[0, ..., ::2], x[..., ::2].float())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outliers", [0.0, 0.01])
def test_values_without_a_range(kind: torch.dtype, outliers: float) -> None:
    """Tokens of zeros and of one number are exact; subnormal ones are off by a step at most."""
    quantizer = BatchedKVQuantizer(tables([1.0] * 64, [0.0] * 64), 3, outliers)
    x = torch.randn(1, 1, 32, 64, generator=torch.Generator().manual_seed(0)).to(kind)
    x[:, :, 0], x[:, :, 1], x[:, :, 2] = 0.0, 0.3, -60000.0
    x[:, :, 3] *= 1e-7
    x[:, :, 4] *= 1e-6
    x[:, :, 5] = 65504.0 * torch.sign(x[:, :, 5])
    got = quantizer.fake_values(x)
    packed = quantizer.pack_values(x)
    assert torch.equal(quantizer.unpack_values(packed, x.shape), got)
    assert torch.equal(got[:, :, :3], x[:, :, :3].float())
    step = 6e-8 if kind is torch.float16 else 0.0
    gap = float(quantizer.tables.value_levels.diff().max()) / 2 + 0.01
    width = (x.float().amax(-1) - x.float().amin(-1))[..., None] / 2
    assert got.isfinite().all()
    assert torch.all((got - x.float()).abs() <= gap * width + 2 * step)


def test_ranges_beyond_16_bits_are_not_for_the_decode_kernel() -> None:
    """It reads zero and scale as fp16, of which these would make infinity."""
    for scale, zero in ((1.0, 70000.0), (70000.0, 0.0), (40000.0, -40000.0)):
        codec = NuqCodec(SPEC, tables([scale] * 64, [zero] * 64))
        assert not codec.cache_shape(64, 1, 1, torch.bfloat16).narrow_tables
    codec = NuqCodec(SPEC, tables([1.0] * 64, [2.0] * 64))
    assert codec.cache_shape(64, 1, 1, torch.float16).narrow_tables
