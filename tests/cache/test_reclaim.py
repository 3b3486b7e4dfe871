"""Whatever is appended, cut, chosen or copied: content is exact, dead blocks are returned."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec, Packed
from kvquant.cache.footprint import cache_nbytes
from kvquant.cache.layout import Layout
from kvquant.cache.reclaim import MAX_DEAD, MAX_ROOM
from kvquant.errors import UserError
from kvquant.formats.blocked_sparse import SparseSlab, check_entries
from kvquant.kernels.block_places import gathered
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import KiviScheme, NuqScheme
from tests.support.caches import contents, quantized
from tests.support.models import tiny_model
from tests.support.quantizers import layer_codec

SIZE, DIM, HEADS = 8, 16, 2
Pair = tuple[torch.Tensor, torch.Tensor]


class ReservedCodec(NuqCodec):
    """Packs as GPU kernels do: into reserved room, entries at a cursor, heads in any order."""

    def reserve(self, blocks: int, like: torch.Tensor) -> Packed | None:
        packed = self.pack(like[:1], like[:1])
        dense = {n: t.new_empty((blocks, *t.shape[1:])) for n, t in packed.dense.items()}
        shape = (blocks, *like.shape[1:])
        # room for all, so that nothing is ever lost in these tests
        slots = blocks * like[0].numel()
        sparse = {
            n: SparseSlab.reserve(shape, slots, like.dtype, like.device) for n in packed.sparse
        }
        return Packed(dense, sparse, reserved=True)

    def pack_into(
        self,
        room: Packed,
        keys: torch.Tensor,
        values: torch.Tensor,
        status: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> None:
        packed = self.pack(*(gathered(x, places, self.block_size) for x in (keys, values)))
        for name, t in packed.dense.items():
            room.dense[name].copy_(t)
        for name, slab in packed.sparse.items():
            to = room.sparse[name]
            assert to.cursor is not None
            for block in range(slab.shape[0]):
                for head in reversed(range(slab.shape[1])):
                    begin, count = int(slab.begin[block, head]), int(slab.count[block, head])
                    at = int(to.cursor)
                    assert at + count <= to.values.numel()
                    to.begin[block, head], to.count[block, head] = at, count
                    to.positions[at : at + count] = slab.positions[begin : begin + count]
                    to.values[at : at + count] = slab.values[begin : begin + count]
                    to.cursor.add_(count)


def make(kind: str) -> Codec:
    if kind == "kivi":
        return layer_codec(KiviScheme(kind="kivi", bits=2, group=8, residual=5), DIM)
    spec = NuqScheme(kind="nuq", bits=3, outliers=0.0 if kind == "none" else 0.03, sinks=2)
    spec = spec.model_copy(update={"block_size": SIZE})  # smaller than a study may ask for
    made = layer_codec(spec, DIM)
    assert made.tables is not None
    return ReservedCodec(spec, made.tables) if kind == "reserved" else made


@dataclass
class Plain:
    """One sequence that keeps everything: sinks, blocks as they come back, a tail."""

    sinks: list[torch.Tensor]
    blocks: list[list[torch.Tensor]] = field(default_factory=list)
    tail: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls) -> Plain:
        none = torch.zeros(HEADS, 0, DIM).half()
        return cls([none, none], [], [none, none])

    def copy(self) -> Plain:
        return Plain(list(self.sinks), list(self.blocks), list(self.tail))

    @property
    def length(self) -> int:
        return self.sinks[0].shape[1] + len(self.blocks) * SIZE + self.tail[0].shape[1]

    def append(self, c: Codec, new: Pair) -> None:
        rest = max(c.sinks - self.sinks[0].shape[1], 0)
        self.sinks = [torch.cat([s, x[:, :rest]], 1) for s, x in zip(self.sinks, new, strict=True)]
        self.tail = [torch.cat([t, x[:, rest:]], 1) for t, x in zip(self.tail, new, strict=True)]
        while self.tail[0].shape[1] >= c.residual + SIZE:
            first = [t[None, :, :SIZE] for t in self.tail]
            self.blocks.append([x[0] for x in c.fake(first[0], first[1])])
            self.tail = [t[:, SIZE:] for t in self.tail]

    def crop(self, c: Codec, length: int) -> None:
        if length >= self.length:
            return
        packed = max(0, length - c.sinks)
        keep, rest = divmod(packed, SIZE)
        self.sinks = [s[:, :length] for s in self.sinks]
        if packed >= len(self.blocks) * SIZE:
            self.tail = [t[:, : packed - len(self.blocks) * SIZE] for t in self.tail]
            return
        self.tail = [x[:, :rest].half() for x in self.blocks[keep]]
        self.blocks = self.blocks[:keep]

    def contents(self) -> list[torch.Tensor]:
        return [
            torch.cat(
                [self.sinks[i].float(), *(b[i] for b in self.blocks), self.tail[i].float()], 1
            )
            for i in range(2)
        ]


@dataclass
class Pairing:
    """A store with its layout, and what it must hold."""

    c: Codec
    store: BlockStore
    layout: Layout
    plain: list[Plain]

    def reclaim(self) -> None:
        change = self.layout.reclaim()
        if change is not None:
            self.store.reclaim(change)

    def append(self, counts: list[int], generator: torch.Generator) -> None:
        shape = (2, len(counts), HEADS, max(counts), DIM)
        keys, values = (torch.randn(shape, generator=generator) * 1.2).half()
        self.store.append(self.layout.append([slice(0, n) for n in counts]), keys, values)
        for b, n in enumerate(counts):
            self.plain[b].append(self.c, (keys[b, :, :n], values[b, :, :n]))

    def crop(self, lengths: list[int]) -> None:
        self.store.uncut(self.layout.crop(lengths))
        self.reclaim()
        for row, length in zip(self.plain, lengths, strict=True):
            row.crop(self.c, length)

    def select(self, order: list[int]) -> None:
        self.layout.select(order)
        self.store.select(torch.tensor(order))
        self.reclaim()
        self.plain = [self.plain[i].copy() for i in order]

    def fork(self) -> Pairing:
        rows = [row.copy() for row in self.plain]
        return Pairing(self.c, self.store.fork(), self.layout.fork(), rows)

    def check(self) -> None:
        for b, row in enumerate(self.plain):
            for got, want in zip(contents(self.store, self.layout, b), row.contents(), strict=True):
                assert torch.equal(got, want)
        living = len({block for table in self.layout.table for block in table})
        places = sum(record.capacity for record in self.layout.arenas)
        held = sum(a.dense["keys"].shape[0] for a in self.store.arenas if a.dense)
        assert held == places <= living + living / MAX_DEAD + living / MAX_ROOM
        table = self.store.arena_table()
        if isinstance(self.c, ReservedCodec):
            assert table is not None
            rows = [a.addresses for a in self.store.arenas]
            assert table[: len(rows)].tolist() == rows


@pytest.mark.fault(
    "library",
    "random appends, steps, crops, selections, copies",
    "bit-equal to a plain list; memory within the stated bound after each",
)
@pytest.mark.parametrize("kind", ["nuq", "none", "kivi", "reserved"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_operations(kind: str, data: st.DataObject) -> None:
    """Caches and their copies hold what a plain list of tensors holds, bit for bit, and no more."""
    c, generator = make(kind), torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    batch = data.draw(st.integers(1, 4))
    first = Pairing(c, BlockStore(c), Layout(c.sinks, SIZE, c.residual), [])
    first.plain = [Plain.empty() for _ in range(batch)]
    first.append([data.draw(st.integers(1, 90)) for _ in range(batch)], generator)
    caches = [first]
    for _ in range(data.draw(st.integers(1, 12))):
        one = caches[data.draw(st.integers(0, len(caches) - 1))]
        rows = len(one.plain)
        what = data.draw(st.sampled_from(["append", "step", "crop", "select", "fork", "drop"]))
        if what == "append":
            counts = [data.draw(st.integers(0, 40)) for _ in range(rows)]
            if max(counts):
                one.append(counts, generator)
        elif what == "step" and min(row.length for row in one.plain) >= c.sinks:
            for _ in range(data.draw(st.integers(1, 20))):
                one.append([1] * rows, generator)
        elif what == "crop":
            one.crop([data.draw(st.integers(1, max(1, row.length))) for row in one.plain])
        elif what == "select":
            one.select(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
        elif what == "fork" and len(caches) < 4:
            caches.append(one.fork())
        elif what == "drop" and len(caches) > 1:
            caches.remove(one)
        for each in caches:
            each.check()


@pytest.mark.fault(
    "library",
    "appending and cropping for ever",
    "memory stays",
)
@pytest.mark.parametrize("kind", ["nuq", "reserved"])
def test_appending_and_cropping_for_ever_takes_no_memory(kind: str) -> None:
    c, generator = make(kind), torch.Generator().manual_seed(0)
    one = Pairing(c, BlockStore(c), Layout(c.sinks, SIZE, c.residual), [Plain.empty()])
    one.append([300], generator)
    sizes = set()
    for _ in range(60):
        one.append([40], generator)
        one.crop([300])
        sizes.add(one.store.nbytes)
    one.check()
    assert max(sizes) <= min(sizes) * 1.2


@pytest.mark.parametrize("kind", ["nuq", "reserved"])
def test_entries_of_returned_appends_are_written_over(kind: str) -> None:
    """In an arena with room, a cropped append leaves neither blocks nor outliers behind."""
    c, generator = make(kind), torch.Generator().manual_seed(0)
    one = Pairing(c, BlockStore(c), Layout(c.sinks, SIZE, c.residual), [Plain.empty()])
    one.append([SIZE * 320 + 2], generator)
    one.append([SIZE], generator)  # an arena with room for nine more
    one.crop([SIZE * 321 + 2])
    assert one.layout.arenas[1].room == 9
    before = one.store.nbytes
    for _ in range(50):
        one.append([SIZE * 3], generator)
        one.crop([SIZE * 321 + 2])
    assert one.store.nbytes <= before + 2000  # a segment at most
    one.check()


@pytest.mark.fault(
    "library",
    "63 of 64 sequences finish",
    "the bytes of one alone",
)
def test_a_finished_sequence_returns_its_memory() -> None:
    """One of 64 is left: what it holds is what it would hold alone, tensors of the others die."""
    qm = quantized(tiny_model(), NuqScheme(kind="nuq", bits=3, outliers=0.01, block_size=32))
    ids = torch.randint(0, 97, (64, 150), generator=torch.Generator().manual_seed(0))
    cache, alone = qm.new_cache(), qm.new_cache()
    with torch.inference_mode():
        qm.model(input_ids=ids, past_key_values=cache)
        qm.model(input_ids=ids[7:8], past_key_values=alone)
    gc.collect()
    whole = cache_nbytes(cache)
    cache.batch_select_indices(torch.tensor([7]))
    assert cache_nbytes(cache) == cache_nbytes(alone) < whole / 20
    more = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got = qm.model(input_ids=more, past_key_values=cache).logits
        want = qm.model(input_ids=more, past_key_values=alone).logits
    torch.testing.assert_close(got, want)


def test_beams_share_their_prompt() -> None:
    """Beams that descend from one hold its blocks once."""
    qm = quantized(tiny_model(), NuqScheme(kind="nuq", bits=3, outliers=0.01, block_size=32))
    ids = torch.randint(0, 97, (1, 150), generator=torch.Generator().manual_seed(0))
    cache, alone = qm.new_cache(), qm.new_cache()
    with torch.inference_mode():
        qm.model(input_ids=ids.expand(8, -1), past_key_values=cache)
        qm.model(input_ids=ids, past_key_values=alone)
    cache.reorder_cache(torch.zeros(8, dtype=torch.long))
    alone.batch_repeat_interleave(8)
    assert cache_nbytes(cache) == cache_nbytes(alone)


@pytest.mark.fault(
    "library",
    "prompt-lookup decoding",
    "at most 1.3 times a fresh cache",
)
def test_prompt_lookup_holds_what_the_text_needs() -> None:
    """Candidates that were refused leave nothing behind."""
    qm = quantized(tiny_model(), NuqScheme(kind="nuq", bits=3, outliers=0.01, block_size=32))
    prompt = torch.arange(20).repeat(4)[None]
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"max_new_tokens": 300, "prompt_lookup_num_tokens": 10}
    cache, fresh = qm.new_cache(), qm.new_cache()
    qm.model.generate(prompt, past_key_values=cache, **settings)
    with torch.inference_mode():
        qm.model(input_ids=torch.zeros(1, cache.get_seq_length()).long(), past_key_values=fresh)
    assert cache_nbytes(cache) <= 1.3 * cache_nbytes(fresh)


def test_choosing_no_sequence_is_refused() -> None:
    qm = quantized(tiny_model(), NuqScheme(kind="nuq", bits=3, outliers=0.01, block_size=32))
    cache = qm.new_cache()
    with torch.inference_mode():
        qm.model(input_ids=torch.zeros(2, 50).long(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"indices: no sequence is kept"):
        cache.batch_select_indices(torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"indices: \[0, 2\], but the cache holds 2 sequences"):
        cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.lengths == [50, 50]


def test_a_cut_that_fails_halfway_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in one layer: the cache refuses instead of reading layers that disagree."""
    qm = quantized(tiny_model(), NuqScheme(kind="nuq", bits=3, outliers=0.01, block_size=32))
    cache, ids = qm.new_cache(), torch.zeros(2, 150).long()
    with torch.inference_mode():
        qm.model(input_ids=ids, past_key_values=cache)

        def fail(change: Any) -> None:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(cache.layers[1].store, "reclaim", fail)
        with pytest.raises(torch.OutOfMemoryError):
            cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(RuntimeError, match=r"choosing or cutting its sequences failed; reset"):
            qm.model(input_ids=ids[:1, :1], past_key_values=cache)
        cache.reset()
        qm.model(input_ids=ids, past_key_values=cache)


@pytest.mark.fault(
    "library",
    "outlier entries beyond 32-bit offsets",
    "one line",
)
def test_offsets_that_do_not_fit_are_refused() -> None:
    assert check_entries(2**31 - 1) == 2**31 - 1
    with pytest.raises(UserError, match="outliers: 2147483648 in one layer"):
        check_entries(2**31)


@pytest.mark.fault(
    "library",
    "a copy whose original cuts and appends",
    "the copy is unchanged",
)
def test_a_copy_keeps_what_the_other_cuts_and_writes_again() -> None:
    """Places in an arena with room that a copy still reads are not given out a second time."""
    c, generator = make("none"), torch.Generator().manual_seed(0)
    one = Pairing(c, BlockStore(c), Layout(c.sinks, SIZE, c.residual), [Plain.empty()])
    one.append([SIZE * 320 + 2], generator)
    one.append([SIZE], generator)
    one.append([SIZE * 2], generator)
    other = one.fork()
    one.crop([SIZE * 321 + 2])
    one.append([SIZE * 2], generator)
    one.check()
    other.check()
