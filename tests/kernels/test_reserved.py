"""Arenas that kernels fill in place hold what the PyTorch path would have stored."""

from __future__ import annotations

import pytest
import torch

from kvquant.cache.block_store import BlockStore
from kvquant.cache.layout import Layout
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import NuqScheme
from tests.kernels.emulate import emulate
from tests.support.quantizers import constant_quantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def codec_of(scale: float, outliers: float = 0.01) -> NuqCodec:
    """The codec of one head of 64 with the same range in all channels."""
    spec = NuqScheme(kind="nuq", bits=3, outliers=outliers, block_size=32)
    return NuqCodec(spec, constant_quantizer(1, 64, 3, scale).to(DEVICE))


@pytest.mark.parametrize("wish", ["triton", "auto"])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_same_as_without_kernels(
    outliers: float, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wish == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(2)
    codec = codec_of(2.3, outliers)
    keys, values = torch.randn(2, 2, 1, 51, 64).half().to(DEVICE)
    stores = {}
    for kernels in (wish, "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        if DEVICE == "cpu" and kernels == "auto":
            emulate(monkeypatch)
        store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, codec.residual)
        # A block of the first sequence is full after the first part, one of the other at the end:
        # no more, as Triton's interpreter takes a tenth of a second per token.
        for part in (slice(0, 34), slice(34, 35), slice(35, 51)):
            columns = part.stop - part.start
            plan = layout.append([slice(0, columns), slice(0, max(columns - 9, 1))])
            store.append(plan, keys[:, :, part], values[:, :, part])
        stores[kernels] = (store, layout)
    store, layout = stores[wish]
    other, _ = stores["pytorch"]
    assert all(arena.reserved for arena in store.arenas)
    assert not any(arena.reserved for arena in other.arenas)
    assert store.arena_table() is not None
    assert other.arena_table() is None
    assert store.status is not None
    assert store.status.tolist() == [0, 0]
    assert [len(table) for table in layout.table] == [1, 1]
    for table in layout.table:
        for arena, place in table:
            for mine, theirs in zip(
                store.unpack(arena, slice(place, place + 1)),
                other.unpack(arena, slice(place, place + 1)),
                strict=True,
            ):
                assert torch.equal(mine, theirs)


def test_room_is_made_for_more_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KVQUANT_KERNELS", "triton")
    codec = codec_of(0.3)
    keys, values = torch.randn(2, 1, 1, 33, 64).half().to(DEVICE)

    def fill() -> BlockStore:
        store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, codec.residual)
        store.append(layout.append([slice(0, 33)]), keys, values)
        return store

    first = fill()
    assert first.status is not None and int(first.status[0]) > 0  # most are outside the range
    assert first.crowding() > 1.0
    codec.widen(1.1 * first.crowding())
    second = fill()
    assert second.status is not None and second.status.tolist() == [0, 0]
    assert 0.0 < second.crowding() <= 1.0
