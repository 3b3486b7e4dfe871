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


@pytest.mark.parametrize("wish", ["triton", "auto"])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_same_as_without_kernels(
    outliers: float, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wish == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(2)
    tables = constant_quantizer(1, 64, 3, 2.3)
    codec = NuqCodec(
        NuqScheme(kind="nuq", bits=3, outliers=outliers, block_size=32), tables.to(DEVICE)
    )
    keys, values = torch.randn(2, 2, 1, 103, 64).half().to(DEVICE)
    stores, plans = {}, []
    for kernels in (wish, "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        if DEVICE == "cpu" and kernels == "auto":
            emulate(monkeypatch)
        store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, codec.residual)
        for part in (slice(0, 70), slice(70, 71), slice(71, 103)):
            columns = part.stop - part.start
            plans.append(layout.append([slice(0, columns), slice(0, max(columns - 9, 1))]))
            store.append(plans[-1], keys[:, :, part], values[:, :, part])
        stores[kernels] = (store, layout)
    store, layout = stores[wish]
    other, _ = stores["pytorch"]
    assert all(arena.reserved for arena in store.arenas)
    assert not any(arena.reserved for arena in other.arenas)
    assert store.arena_table() is not None
    assert other.arena_table() is None
    assert store.status is not None
    assert store.status.tolist() == [0, 0]
    for table in layout.table:
        assert table
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
    tables = constant_quantizer(1, 64, 3, 1.0)
    codec = NuqCodec(NuqScheme(kind="nuq", bits=3, block_size=32), tables.to(DEVICE))
    keys, values = torch.randn(2, 1, 1, 193, 64).half().to(DEVICE)

    def fill() -> BlockStore:
        store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, codec.residual)
        store.append(layout.append([slice(0, 193)]), keys, values)
        return store

    first = fill()
    assert first.status is not None and int(first.status[0]) > 0  # a third is outside the range
    assert first.crowding() > 1.0
    codec.widen(1.1 * first.crowding())
    second = fill()
    assert second.status is not None and second.status.tolist() == [0, 0]
    assert 0.0 < second.crowding() <= 1.0
