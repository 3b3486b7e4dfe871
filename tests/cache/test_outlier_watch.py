"""What a cache loses on a GPU is told in a later call, without a wait, and the next has room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.outlier_watch import OutlierWatch, widen_codecs
from kvquant.errors import OutlierOverflow
from kvquant.models.loading import QuantizedModel
from kvquant.study.schemes import NuqScheme
from tests.kernels.emulate import emulate, emulate_decode
from tests.support.caches import quantized
from tests.support.models import tiny_model
from tests.support.quantizers import constant_quantizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUQ3 = NuqScheme(kind="nuq", bits=3, block_size=32)


class Arrival:
    """Stands for the event behind a copy to the host."""

    def __init__(self) -> None:
        self.there = False

    def query(self) -> bool:
        return self.there


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Arrival]:
    """The copies that were started; a watch then has a status on a CPU as on a GPU."""
    made: list[Arrival] = []

    def copy(status: torch.Tensor) -> tuple[torch.Tensor, Arrival]:
        made.append(Arrival())
        return status.clone(), made[-1]

    def status(watch: OutlierWatch, device: torch.device) -> torch.Tensor:
        if device not in watch._status:
            watch._status[device] = torch.zeros(2, dtype=torch.int32, device=device)
        return watch._status[device]

    monkeypatch.setattr("kvquant.cache.outlier_watch._copy_to_host", copy)
    monkeypatch.setattr(OutlierWatch, "status", status)
    return made


def test_a_cpu_has_nothing_to_watch() -> None:
    watch = OutlierWatch()
    assert watch.status(torch.device("cpu")) is None
    watch.note_packing()
    watch.check()
    watch.settle()


def test_a_loss_is_told_when_its_copy_is_there(copies: list[Arrival]) -> None:
    watch = OutlierWatch()
    status = watch.status(torch.device("cpu"))
    assert status is not None and watch.status(torch.device("cpu")) is status
    watch.check()
    assert not copies  # nothing was packed
    watch.note_packing()
    watch.check()
    status[0] += 5
    watch.note_packing()
    watch.check()
    assert len(copies) == 1  # one at a time
    copies[0].there = True
    watch.check()  # the first copy is older than the loss; the second starts
    watch.check()
    assert len(copies) == 2
    copies[1].there = True
    with pytest.raises(OutlierOverflow, match="5 found no room"):
        watch.check()
    watch.check()
    assert len(copies) == 2  # no news without packing


def test_settling_reads_the_device_itself(copies: list[Arrival]) -> None:
    watch = OutlierWatch()
    status = watch.status(torch.device("cpu"))
    assert status is not None
    watch.note_packing()
    watch.check()
    watch.settle()
    status[0] += 7
    with pytest.raises(OutlierOverflow, match=r"7 found no room.*widen"):
        watch.settle()
    copies[0].there = True
    watch.check()  # that copy was dropped
    status[1] = 1
    with pytest.raises(ValueError, match="NaN or Inf"):  # comes first: its outliers mean nothing
        watch.settle()


def test_codecs_widen_by_what_was_lacking_and_a_little() -> None:
    class Store:
        def __init__(self, crowding: float) -> None:
            self.codec, self.factors, self._crowding = self, list[float](), crowding

        def crowding(self) -> float:
            return self._crowding

        def widen(self, factor: float) -> None:
            self.factors.append(factor)

    stores: list[Any] = [Store(0.0), Store(1.0), Store(1.5)]
    widen_codecs(stores)
    assert [store.factors for store in stores] == [[], [], [pytest.approx(1.65)]]


def unlike_calibration() -> QuantizedModel:
    """A model nearly all of whose keys are outside the range that its calibration found."""
    narrow = [constant_quantizer(2, 64, 3, 1e-3)] * 2
    return quantized(tiny_model(head_dim=64).to(DEVICE), NUQ3, narrow)


def test_a_cache_tells_its_loss_and_the_next_has_room(
    copies: list[Arrival], monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":
        emulate(monkeypatch)
        emulate_decode(monkeypatch)
    qm = unlike_calibration()
    ids = torch.randint(0, 97, (1, 100)).to(DEVICE)

    def fill() -> KVQuantCache:
        cache = qm.new_cache()
        assert isinstance(cache, KVQuantCache)
        with torch.inference_mode():
            qm.model(input_ids=ids, past_key_values=cache)
        return cache

    crowded = fill()
    with pytest.raises(OutlierOverflow, match="found no room"):
        crowded.settle()
    crowded.begin_forward(1, 1, None, DEVICE)
    copies[0].there = True
    with pytest.raises(OutlierOverflow, match="found no room"):
        crowded.begin_forward(1, 1, None, DEVICE)
    crowded.widen()
    fill().settle()
    crowded.reset()
    crowded.settle()  # what is forgotten is not missed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nan_is_told_at_the_latest_in_the_call_after() -> None:
    qm = quantized(tiny_model().cuda(), NUQ3)
    cache = qm.new_cache()
    assert isinstance(cache, KVQuantCache)
    with torch.inference_mode():
        embeds = torch.randn(1, 64, 64, device="cuda")
        embeds[0, 5] = float("nan")
        with pytest.raises(ValueError, match="NaN or Inf"):
            for _ in range(4):
                qm.model(inputs_embeds=embeds, past_key_values=cache)
                torch.cuda.synchronize()
