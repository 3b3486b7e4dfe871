"""`kvquant bench append`: measures the cost of an appended token as the cache grows.

Each size is measured on new stores that large calls have filled to it. The series take turns round
by round. A round appends a multiple of every block size in calls of `chunk` tokens, so that every
round packs the same number of blocks. The device is synchronized before and after each timed call.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.append_stores import (
    BlockedStore,
    ConcatenatedStore,
    GrowingStore,
    Store,
    append_codec,
)
from kvquant.benchmarks.timing import MIN_ROUNDS, Clock, interleave, summarize
from kvquant.benchmarks.workload import check_device
from kvquant.cache.codec import Codec
from kvquant.errors import UserError
from kvquant.models.oom_retry import fits_in_memory
from kvquant.runtime.provenance import environment
from kvquant.study.append import AppendSpec
from kvquant.study.config import Study, load_study
from kvquant.study.digests import append_digest
from kvquant.study.records import AppendPoint, AppendRecord, write_record
from kvquant.study.schemes import NuqScheme

CONCATENATION = "concatenation"  # the series of KVQuant's procedure
FILL = 4096  # tokens per call while a store is filled
WARM = 128  # tokens that each series gets once as a warm-up


class Data:
    """Holds random keys and values, which are the same for every store.

    Args:
        spec: Shape of the data.
        device: Device of the data.
        seed: Seed of the random generator.
    """

    def __init__(self, spec: AppendSpec, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        length = min(max(*spec.sizes, *spec.chunks), max(FILL, *spec.chunks))
        shape = (2, spec.batch_size, spec.kv_heads, length, spec.head_dim)
        self._both = torch.randn(shape, generator=generator, device=device).half()
        self._length = length

    def take(self, count: int, at: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of some tokens, `[batch_size, kv_heads, count, head_dim]`."""
        first = at % (self._length - count + 1)
        keys, values = self._both[:, :, :, first : first + count]
        return keys, values

    def fill(self, store: Store, tokens: int) -> None:
        """Appends `tokens` tokens per sequence in large calls."""
        for done in range(0, tokens, FILL):
            store.append(*self.take(min(FILL, tokens - done)))


class Series:
    """Measures one store at one size, one round per call.

    Args:
        new: Makes the store.
        data: The data to append.
        clock: Times each call of the store.
        size: Tokens per sequence before the first round.
        chunk: Tokens per sequence and call.
        calls: Calls per round.
    """

    def __init__(
        self, new: Callable[[], Store], data: Data, clock: Clock, size: int, chunk: int, calls: int
    ) -> None:
        self._new, self._data, self._clock = new, data, clock
        self._size, self._chunk, self._calls = size, chunk, calls
        self._store: Store | None = None
        self.times: list[list[float]] = []
        self.nbytes = 0

    def fill(self) -> None:
        """Makes the store and fills it to its size."""
        self._store = self._new()
        self._data.fill(self._store, self._size)

    def __call__(self) -> None:
        """Runs and times one round."""
        store, row = self._store, []
        if store is None:
            raise MemoryError  # the store could not be filled
        try:
            for i in range(self._calls):
                keys, values = self._data.take(self._chunk, 7 * len(self.times) + i)
                row.append(self._clock.time(partial(store.append, keys, values))[1])
        except Exception:
            self._store = None  # free the memory of a store that ran out of it
            raise
        self.times.append(row)
        self.nbytes = store.nbytes

    def point(self, name: str, fits: bool) -> AppendPoint:
        """Returns the measurement as a point of the record."""
        here: dict[str, Any] = {"series": name, "chunk": self._chunk, "tokens": self._size}
        if not fits or not self.times:
            return AppendPoint(**here, status="oom")
        share = [sum(row) / (self._calls * self._chunk) for row in self.times]
        return AppendPoint(
            **here,
            status="ok",
            token_ms=summarize(share),
            call_ms=summarize([t for row in self.times for t in row]),
            cache_bytes=self.nbytes,
        )


def _new_store(codec: Codec | None, capacity: int) -> Store:
    """Returns an empty store of a scheme, which needs no capacity."""
    return GrowingStore() if codec is None else BlockedStore(codec)


def measure(study: Study, device: torch.device, clock: Clock, rep: int) -> AppendRecord:
    """Measures all series at all sizes.

    Args:
        study: A study with a section `append`.
        device: Device of the stores.
        clock: Times each call.
        rep: Number of the repetition, which seeds the data.

    Raises:
        UserError: The study has no such section, or the headline scheme cannot be packed token by
            token.
    """
    spec = study.append
    digest = append_digest(study)  # refuses a study without the section
    assert spec is not None
    shape = (spec.kv_heads, spec.head_dim, device)
    codecs = {name: append_codec(study.scheme(name), *shape) for name in study.append_schemes()}
    blocks = [codec.block_size for codec in codecs.values() if codec is not None]
    rounds = {chunk: math.lcm(chunk, *blocks) for chunk in spec.chunks}
    makers: dict[str, Callable[[int], Store]] = {
        name: partial(_new_store, codec) for name, codec in codecs.items()
    }
    if spec.concatenation:
        headline = study.scheme(study.headline)
        if not isinstance(headline, NuqScheme):
            raise UserError(
                f"append.concatenation: '{study.headline}' is not of kind nuq: set it to false"
            )
        single = append_codec(headline, *shape)
        assert single is not None
        makers[CONCATENATION] = partial(ConcatenatedStore, single)
    data = Data(spec, device, rep)

    def cell(size: int, chunk: int, count: int) -> list[AppendPoint]:
        tokens, calls = rounds[chunk], rounds[chunk] // chunk
        capacity = size + count * tokens
        sides = [
            Series(partial(make, capacity), data, clock, size, chunk, calls)
            for make in makers.values()
        ]
        filled = [fits_in_memory(side.fill) for side in sides]
        _, fits = interleave(list(sides), warmup=0, iterations=count, max_seconds=math.inf)
        both = zip(makers, sides, filled, fits, strict=True)
        return [side.point(name, full and fit) for name, side, full, fit in both]

    for chunk in spec.chunks:
        cell(WARM, chunk, MIN_ROUNDS)  # builds kernels and the allocator's pools
    points = [p for chunk in spec.chunks for n in spec.sizes for p in cell(n, chunk, spec.rounds)]
    return AppendRecord(
        study=study.study,
        spec_digest=digest,
        environment=environment([device]),
        device=device.type,
        rep=rep,
        batch_size=spec.batch_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        round_tokens={str(chunk): tokens for chunk, tokens in rounds.items()},
        points=points,
    )


def show(record: AppendRecord, console: Console) -> None:
    """Prints microseconds per token, with a row per size and a column per series and chunk."""
    title = f"append on {record.device}: {record.batch_size} x {record.kv_heads} x "
    table = Table(title=f"{title}{record.head_dim}, microseconds per token")
    table.add_column("tokens", justify="right")
    heads = list(dict.fromkeys((p.series, p.chunk) for p in record.points))
    for series, chunk in heads:
        table.add_column(f"{series}, {chunk} per call", justify="right")
    cells = {(p.tokens, p.series, p.chunk): p.token_ms for p in record.points}
    for size in sorted({p.tokens for p in record.points}):
        found = [cells.get((size, *head)) for head in heads]
        shown = [f"{1e3 * t.median:,.1f}" if t else "out of memory" for t in found]
        table.add_row(f"{size:,}", *shown)
    console.print(table)


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant bench append`."""
    study = load_study(args.study)
    append_digest(study)
    if args.rep < 0:
        raise UserError(f"--rep: must not be negative (got {args.rep})")
    if args.out.exists():  # report before minutes of measuring, not after
        raise UserError(f"--out: {args.out} exists: delete it by name to measure again")
    device = check_device(args)
    if device.type == "cpu":
        # A token is too little work for several threads, whose barriers would be timed instead.
        torch.set_num_threads(1)
    with torch.inference_mode():
        record = measure(study, device, Clock.of(device), args.rep)
    record = record.model_copy(update={"device": args.device_name})
    write_record(args.out, record)
    show(record, Console(width=100))
