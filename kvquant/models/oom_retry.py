"""Out-of-memory handling: retry in smaller batches, and with more room for outliers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from kvquant.errors import OutlierOverflow, UserError
from kvquant.runtime.progress import note

T = TypeVar("T")
# Messages of allocators, cuBLAS and the driver; only torch's allocator has an exception class.
_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that memory ran out."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)
    )


def release_memory() -> None:
    """Frees the memory of a failed attempt.

    Call it after the `except` block, because the exception's traceback keeps tensors alive.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits_in_memory(work: Callable[[], object]) -> bool:
    """Runs `work` and returns whether it fitted in memory, freeing the memory if it did not.

    Any other exception passes through.
    """
    try:
        work()
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
    release_memory()
    return False


def retry_on_overflow(new_cache: Callable[[], Any], work: Callable[[Any], T]) -> T:
    """Runs `work` on a new cache, again with more room if the cache lost outliers.

    The cache is emptied afterwards, because its layers refer to it and its memory would otherwise
    wait for the garbage collector.

    Args:
        new_cache: Makes an empty cache.
        work: Fills the cache and returns the result.

    Returns:
        The result of the run that lost no outlier.
    """
    while True:
        cache = new_cache()
        settle = getattr(cache, "settle", None)  # caches without it lose no outliers
        try:
            found = work(cache)
            if settle is not None:
                settle()
            return found
        except OutlierOverflow as error:
            note(f"retrying with more room: {str(error).partition(';')[0]}")
            cache.widen()
        finally:
            cache.layers.clear()


def without_retry(work: Callable[[list[int]], T]) -> Callable[[list[int]], T]:
    """Returns `work` for :func:`in_batches` of processes that share a model.

    If one of them tried again with fewer sequences, the others would wait for it forever.

    Args:
        work: Takes the indices of a batch; where it runs out of memory, the returned function
            raises a `UserError`.
    """

    def once(rows: list[int]) -> T:
        try:
            return work(rows)
        except Exception as error:
            if not out_of_memory(error):
                raise
            told = str(error).partition("\n")[0]
        raise UserError(
            f"batch_size: out of memory with {len(rows)} sequences ({told}), and processes that "
            "share a model (tp_plan) do not try again by themselves; choose a smaller one"
        )

    return once


def in_batches(
    sizes: Sequence[int],
    work: Callable[[list[int]], T],
    *,
    batch_size: int,
    batch_tokens: int | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Runs `work` on batches of sequences of similar length, the longest first.

    A batch that runs out of memory is halved, and no later batch has more tokens than that half.

    Args:
        sizes: Number of tokens of each sequence.
        work: Takes the indices of a batch; after a failure it is called again with half of them.
        batch_size: Largest number of sequences in a batch.
        batch_tokens: Largest number of tokens in a batch of several sequences, padding included.

    Yields:
        The indices of a batch and the result of `work`.
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    max_tokens, at = batch_tokens, 0
    while at < len(order):
        width = sizes[order[at]]
        rows = batch_size if max_tokens is None else max(1, min(batch_size, max_tokens // width))
        batch = order[at : at + rows]
        try:
            found = work(batch)
        except Exception as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
        else:
            at += len(batch)
            yield batch, found
            continue
        release_memory()
        half = (len(batch) + 1) // 2
        max_tokens = half * width
        note(f"out of memory: continuing with batches of {half} x {width} tokens")
