"""Clocks, rounds, percentiles; running out of memory is a result."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from kvquant.benchmarks.timing import Clock, interleave, summarize
from kvquant.models.oom_retry import fits_in_memory


class FakeTime:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passing(self, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.now += seconds

        return work


def test_clock_waits_for_the_device_on_both_sides() -> None:
    fake, waits = FakeTime(), []

    def wait() -> None:
        waits.append(fake.now)
        fake.now += 1.0  # the device still works for a second

    result, elapsed = Clock(wait, fake).time(lambda: fake.passing(0.25)() or "done")
    assert result == "done"
    assert waits == [100.0, 101.25]
    assert elapsed == pytest.approx(1250.0)  # the first wait is outside, the second inside


def test_summary() -> None:
    found = summarize([float(i) for i in range(101)])
    assert (found.median, found.p10, found.p90, found.p99, found.n) == (50, 10, 90, 99, 101)
    assert summarize([3.0]).p99 == 3.0


def rounds_of(fake: FakeTime, seconds: float, **options: float) -> tuple[int, str]:
    order: list[str] = []

    def side(name: str) -> Callable[[], None]:
        return lambda: order.append(name) or fake.passing(seconds)()  # type: ignore[func-returns-value]

    spec = {"warmup": 2, "iterations": 100, "max_seconds": 1e9, **options}
    rounds, fits = interleave([side("A"), side("B")], now=fake, **spec)  # type: ignore[arg-type]
    assert fits == [True, True]
    return rounds, "".join(order)


def test_rounds_alternate_and_warm_up_first() -> None:
    rounds, order = rounds_of(FakeTime(), 1.0, iterations=7)
    assert rounds == 7
    assert order == "AB" * 9


@pytest.mark.parametrize("options", [{"max_seconds": 0.5}, {"iterations": 1}])
def test_never_fewer_than_five_rounds(options: dict[str, float]) -> None:
    assert rounds_of(FakeTime(), 10.0, **options)[0] == 5


def test_few_rounds_may_be_enough() -> None:
    assert rounds_of(FakeTime(), 1.0, iterations=2, least=2)[0] == 2


def test_time_ends_the_rounds_without_the_warm_up() -> None:
    # a round takes 2 s: after 10 rounds 20 s are over; 20 rounds of warm-up do not count
    assert rounds_of(FakeTime(), 1.0, max_seconds=20, warmup=20)[0] == 10


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_one_side_out_of_memory_does_not_stop_the_other(error: Exception) -> None:
    calls = {"good": 0, "bad": 0}

    def good() -> None:
        calls["good"] += 1

    def bad() -> None:
        calls["bad"] += 1
        if calls["bad"] == 3:
            raise error

    found = interleave([good, bad], warmup=0, iterations=6, max_seconds=99)
    assert found == (6, [True, False])
    assert calls == {"good": 6, "bad": 3}


def test_both_out_of_memory_ends_at_once() -> None:
    def bad() -> None:
        raise MemoryError

    assert interleave([bad, bad], warmup=3, iterations=6, max_seconds=99) == (0, [False, False])


def test_other_errors_are_not_hidden() -> None:
    def broken() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        interleave([broken], warmup=0, iterations=1, max_seconds=1)


def test_memory_of_a_failed_attempt_is_given_back() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> None:
        big = torch.zeros(10)
        kept.append(weakref.ref(big))
        raise MemoryError

    gc.disable()
    try:
        assert not fits_in_memory(attempt)
    finally:
        gc.enable()
    assert kept[0]() is None


def test_a_request_beyond_any_memory_is_recognised() -> None:
    assert not fits_in_memory(lambda: torch.empty(2**55, dtype=torch.uint8))
