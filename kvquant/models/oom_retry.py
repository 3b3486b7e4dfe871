"""Work that is cut smaller where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from kvquant.errors import OutlierOverflow
from kvquant.runtime.progress import note

T = TypeVar("T")
# What allocators, cuBLAS and the driver say; only torch's own allocator has an exception class.
_SAID = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)
    )


def give_back() -> None:
    """Returns what a failed attempt held to the device.

    To be called when its exception is gone, whose traceback keeps the attempt's tensors alive.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits_in_memory(work: Callable[[], object]) -> bool:
    """Runs `work`; False if memory ran out, after giving back what the attempt held.

    Any other exception passes through.
    """
    try:
        work()
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
    give_back()
    return False


def whole(new_cache: Callable[[], Any], work: Callable[[Any], T]) -> T:
    """What `work` returns for an empty cache that lost no outlier; fills a roomier one if it did.

    The cache is empty afterwards: its layers refer to it, so that its memory would wait for the
    garbage collector.

    Args:
        new_cache: Makes one.
        work: Fills it.
    """
    while True:
        cache = new_cache()
        settle = getattr(cache, "settle", None)  # others lose nothing
        try:
            found = work(cache)
            if settle is not None:
                settle()
            return found
        except OutlierOverflow as error:
            note(f"once more with more room: {str(error).partition(';')[0]}")
            cache.widen()
        finally:
            cache.layers.clear()


def in_batches(
    sizes: Sequence[int],
    work: Callable[[list[int]], T],
    *,
    batch_size: int,
    batch_tokens: int | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Results of `work` for batches of sequences of similar length, the longest first.

    A batch that runs out of memory is halved, and no later one may be larger, counted in tokens.

    Args:
        sizes: Tokens of each sequence.
        work: Gets the indices of a batch; it may be called again with the first of them.
        batch_size: Most sequences of a batch.
        batch_tokens: Most tokens of a batch of several sequences, padding included.

    Yields:
        The indices of a batch and what `work` returned for it.
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    most, at = batch_tokens, 0
    while at < len(order):
        width = sizes[order[at]]
        rows = batch_size if most is None else max(1, min(batch_size, most // width))
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
        give_back()
        half = (len(batch) + 1) // 2
        most = half * width
        note(f"out of memory: going on with batches of {half} x {width} tokens")
