"""Batches that fit: every item once, within the limits, and what failed is really given back."""

from __future__ import annotations

import weakref
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import OutlierOverflow, UserError
from kvquant.models.oom_retry import in_batches, out_of_memory, retry_on_overflow, without_retry

SIZES = st.lists(st.integers(1, 300), max_size=40)


@given(SIZES, st.integers(1, 9), st.none() | st.integers(1, 2000), st.integers(300, 1000))
def test_every_item_once_within_the_limits(
    sizes: list[int], most: int, tokens: int | None, room: int
) -> None:
    tried: list[int] = []

    def padded(batch: list[int]) -> int:
        return len(batch) * max(sizes[index] for index in batch)

    def work(batch: list[int]) -> int:
        tried.append(padded(batch))
        assert len(batch) <= most
        assert len(batch) == 1 or tokens is None or padded(batch) <= tokens
        if padded(batch) > room:  # never for one alone
            raise torch.cuda.OutOfMemoryError("no room")
        return padded(batch)

    with patch("gc.collect"):  # takes longer than all else where a worker has imported much
        done = list(in_batches(sizes, work, batch_size=most, batch_tokens=tokens))
    order = [index for batch, _ in done for index in batch]
    assert sorted(order) == list(range(len(sizes)))
    # similar lengths share batches; equally long ones keep their order
    assert order == sorted(order, key=lambda index: (-sizes[index], index))
    assert all(found == padded(batch) for batch, found in done)
    # an attempt that failed is not tried at that size again, so there are few
    failed = [size for size in tried if size > room]
    assert failed == sorted(failed, reverse=True) and len(set(failed)) == len(failed)


class Held:
    """A tensor's stand-in in a reference cycle."""

    def __init__(self) -> None:
        self.me = self


def test_what_a_failed_batch_held_is_gone_before_the_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alive: list[weakref.ref[Held]] = []

    def work(batch: list[int]) -> int:
        assert [ref() for ref in alive] == [None] * len(alive)
        if len(batch) > 1:
            held = Held()
            alive.append(weakref.ref(held))
            raise MemoryError
        return 0

    assert len(list(in_batches([5, 5, 5, 5], work, batch_size=4))) == 4
    assert len(alive) == 2
    assert "continuing with batches of 1 x 5 tokens" in capsys.readouterr().err


def test_one_that_does_not_fit_and_other_errors_are_told() -> None:
    def small(batch: list[int]) -> None:
        raise torch.cuda.OutOfMemoryError("no room at all")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="at all"):
        list(in_batches([3, 2], small, batch_size=2))

    def broken(batch: list[int]) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches([3, 2], broken, batch_size=2))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_so(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) == expected


def test_a_cache_that_lost_outliers_is_filled_anew() -> None:
    made: list[Lossy] = []

    class Lossy:
        """Has room from the third on."""

        def __init__(self) -> None:
            made.append(self)
            self.layers = [object()]
            self.widened = False

        def settle(self) -> None:
            if len(made) < 3:
                raise OutlierOverflow("outliers: 5 found no room in the cache; and so on")

        def widen(self) -> None:
            assert self.layers
            self.widened = True

    assert retry_on_overflow(Lossy, made.index) == 2
    assert [cache.widened for cache in made] == [True, True, False]
    assert not any(cache.layers for cache in made)


def test_processes_that_share_a_model_do_not_try_again() -> None:
    tried: list[list[int]] = []

    def work(batch: list[int]) -> int:
        tried.append(batch)
        raise torch.cuda.OutOfMemoryError("no room\nand more")

    with pytest.raises(UserError, match=r"^batch_size: out of memory with 3 .*\(no room\), and"):
        list(in_batches([5, 5, 5], without_retry(work), batch_size=3))
    assert tried == [[0, 1, 2]]
    assert without_retry(len)([1, 2]) == 2

    def broken(batch: list[int]) -> int:
        raise ValueError("not memory")

    with pytest.raises(ValueError, match="not memory"):
        without_retry(broken)([0])
