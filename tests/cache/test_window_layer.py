"""A layer with a sliding window, beside attention over all tokens ever given.

Also covers: cache.window_plan, cache.packed_cache.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kvquant.cache import window_plan
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.window_layer import WindowLayer
from kvquant.cache.window_plan import ROLLBACK, Windows, ring_capacity
from kvquant.errors import NonFiniteTokens, UserError

HEADS, GROUP, DIM, SCALING = 2, 2, 4, 0.7


def unrotated(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary table that leaves everything as it is."""
    shape = (*positions.shape, DIM)
    return torch.ones(shape), torch.zeros(shape)


class Twin:
    """A cache of one layer with a window, and all tokens that its sequences ever had.

    Args:
        window: Number of tokens that a query sees.
        batch: Number of sequences.
        seed: Of the numbers.
        soft_cap: Bound of the scores.
    """

    def __init__(self, window: int, batch: int, seed: int, soft_cap: float | None = None) -> None:
        self.window, self.soft_cap = window, soft_cap
        self.cache = KVQuantCache([None], unrotated, window=window, soft_cap=soft_cap)
        self.mask = torch.zeros(batch, 0, dtype=torch.long)
        self.held = torch.zeros(2, batch, HEADS, 0, DIM)  # keys and values by column
        self.padded = False
        self.random = torch.Generator().manual_seed(seed)

    def expected(self, queries: torch.Tensor) -> torch.Tensor:
        """The outputs of the last columns' queries, of one sequence and query after another."""
        out = torch.zeros(len(self.mask), queries.shape[2], HEADS * GROUP, DIM)
        for b, row in enumerate(self.mask):
            for i in range(queries.shape[2]):
                column = len(row) - queries.shape[2] + i
                seen = row[: column + 1].nonzero()[-self.window :, 0]
                keys, values = self.held[:, b, :, seen].repeat_interleave(GROUP, 1)
                scores = (queries[b, :, i, None] * keys).sum(-1) * SCALING
                if self.soft_cap is not None:
                    scores = (scores / self.soft_cap).tanh() * self.soft_cap
                out[b, i] = (scores.softmax(-1)[..., None] * values).sum(1)
        return out

    def call(self, new: torch.Tensor) -> None:
        """Gives columns, of which those with 1 in `new` are tokens, and compares their outputs."""
        batch, length = new.shape
        shape = (batch, HEADS, length, DIM)
        queries = torch.randn(batch, HEADS * GROUP, length, DIM, generator=self.random)
        keys, values = (torch.randn(shape, generator=self.random).half().float() for _ in "kv")
        self.mask = torch.cat((self.mask, new), 1)
        self.held = torch.cat((self.held, torch.stack((keys, values))), 3)
        expected = self.expected(queries)
        self.padded |= not bool(self.mask.all())
        given = self.mask if self.padded else None
        self.cache.begin_forward(batch, length, given, torch.device("cpu"))

        def full(*rotated: torch.Tensor, **_: Any) -> torch.Tensor:
            assert torch.equal(rotated[1], keys)
            return expected

        table = unrotated(torch.zeros(1, length))
        found = self.cache.attend(0, queries, keys, values, table, SCALING, full)
        tokens = new.bool()
        torch.testing.assert_close(found[tokens], expected[tokens], atol=1e-5, rtol=1e-5)
        assert bool(found.isfinite().all())

    def select(self, order: list[int]) -> None:
        """Keeps or repeats sequences."""
        self.cache.batch_select_indices(torch.tensor(order))
        self.mask, self.held = self.mask[order], self.held[:, order]

    def crop(self, columns: int) -> bool:
        """Drops the last columns; returns whether the cache let it be."""
        before = self.cache.lengths
        try:
            self.cache.crop(-columns)
        except UserError:
            assert self.cache.lengths == before
            return False
        keep = self.mask.shape[1] - columns
        self.mask, self.held = self.mask[:, :keep], self.held[:, :, :, :keep]
        return True


def padding(generator: random.Random, batch: int, length: int) -> torch.Tensor:
    """Columns of tokens alone, padded on a side, or with holes; one token in all at least."""
    new = torch.ones(batch, length, dtype=torch.long)
    kind = generator.choice(["whole", "whole", "left", "right", "holes"])
    for row in new:
        if kind == "holes":
            row[torch.tensor([generator.random() < 0.3 for _ in row])] = 0
        elif kind != "whole":
            empty = generator.randrange(length + 1)
            row[:empty] = 0
            if kind == "right":
                row.copy_(row.flip(0))
    new[0, 0] = 1
    return new


@pytest.mark.parametrize("seed", [*range(12), 27, 135, 154, 292])
def test_random_calls(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, steps, cuts and choices of sequences, in rings that grow, fill and wrap."""
    monkeypatch.setattr(window_plan, "MAX_QUERIES", 16)
    generator = random.Random(seed)
    window, batch = generator.choice([1, 2, 7, 20]), generator.choice([1, 3])
    twin = Twin(window, batch, seed, generator.choice([None, 0.5]))
    for _ in range(14):
        batch, columns = twin.mask.shape
        match generator.choice(["chunk", "chunk", "steps", "crop", "select"]):
            case "chunk":
                twin.call(padding(generator, batch, generator.choice([1, 5, 30, 90])))
            case "steps":
                for _ in range(generator.randrange(12)):
                    twin.call(torch.ones(batch, 1, dtype=torch.long))
            case "crop" if columns > 2:
                twin.crop(generator.randrange(1, columns - 1))
            case "select" if columns:
                twin.select([generator.randrange(batch) for _ in range(batch)])
    twin.call(torch.ones(len(twin.mask), 3, dtype=torch.long))


def test_padding_before_the_first_token_gives_numbers() -> None:
    """A query that sees nothing at all would give NaN, which later layers would spread."""
    twin = Twin(7, 2, 0, soft_cap=0.5)
    twin.call(torch.tensor([[1, 1], [0, 0]]))
    twin.call(torch.tensor([[1, 1, 1], [0, 0, 1]]))


@pytest.mark.parametrize("row", [0, 1])
def test_a_column_that_is_a_token_in_some_sequences(row: int) -> None:
    """Sequences of one length have other positions where one gets padding."""
    twin = Twin(2, 2, 0)
    twin.call(torch.ones(2, 4, dtype=torch.long))
    new = torch.ones(2, 1, dtype=torch.long)
    new[row] = 0
    twin.call(new)


def test_a_sequence_may_lose_all_tokens() -> None:
    """Nothing that its window has forgotten is needed then, however long it was."""
    twin = Twin(20, 2, 0)
    new = torch.ones(2, 140, dtype=torch.long)
    new[1, :40] = 0
    new[0, 20:] = 0
    twin.call(new)
    assert twin.crop(110)
    assert twin.cache.lengths == [20, 0]
    twin.call(torch.ones(2, 30, dtype=torch.long))
    twin.call(torch.ones(2, 1, dtype=torch.long))


def test_what_a_chosen_sequence_has_lost_goes_with_it() -> None:
    """Two sequences change places after a cut: the short one was never as long as the other."""
    twin = Twin(20, 2, 0)
    new = torch.ones(2, 200, dtype=torch.long)
    new[1, :190] = 0
    twin.call(new)
    assert twin.crop(4)
    twin.select([1, 0])
    assert twin.crop(5)
    twin.call(torch.ones(2, 7, dtype=torch.long))
    assert not twin.crop(64)


def test_a_ring_grows_by_a_share_until_it_holds_the_window() -> None:
    assert ring_capacity(512, 0, 100) == 100
    assert ring_capacity(512, 100, 100) == 100
    assert ring_capacity(512, 100, 101) == 100 + ROLLBACK
    assert ring_capacity(4096, 2048, 2049) == 2048 + 256
    assert ring_capacity(512, 100, 400) == 400
    assert ring_capacity(512, 564, 565) == ring_capacity(512, 0, 9999) == 512 + ROLLBACK


def test_steps_write_into_the_ring_and_allocate_nothing() -> None:
    twin = Twin(20, 2, 0)
    twin.call(torch.ones(2, 200, dtype=torch.long))
    (layer,) = twin.cache.layers
    assert isinstance(layer, WindowLayer) and layer.ring is not None
    places = [x.data_ptr() for x in layer.ring]
    for _ in range(100):
        twin.call(torch.ones(2, 1, dtype=torch.long))
    assert [x.data_ptr() for x in layer.ring] == places


def test_a_step_over_a_part_of_the_window_needs_no_mask() -> None:
    twin = Twin(20, 2, 0)
    plans: list[Any] = []
    for length in (10, 1, 30, 1):
        twin.cache.calls.check()
        twin.call(torch.ones(2, length, dtype=torch.long))
        plan = twin.cache.begin_forward(2, 1, None, torch.device("cpu"))
        plans.append(plan.window)
    found = [plan.step_mask if plan.step else plan for plan in plans]
    assert [mask is None for mask in found] == [True, True, False, False]


def test_sequences_of_one_length_share_a_mask() -> None:
    twin = Twin(20, 3, 0)
    twin.call(torch.ones(3, 30, dtype=torch.long))
    plan = twin.cache.begin_forward(3, 9, None, torch.device("cpu")).window
    assert plan is not None and [part.mask.shape[0] for part in plan.parts] == [1]
    mask = torch.ones(3, 39, dtype=torch.long)
    mask[0, 30] = 0
    plan = twin.cache.begin_forward(3, 9, mask, torch.device("cpu")).window
    assert plan is not None and [part.mask.shape[0] for part in plan.parts] == [3]


def test_the_plan_of_a_graph_reads_positions_on_the_device_alone() -> None:
    windows = Windows(20)
    windows.reserve()
    plan = windows.graph_plan(torch.tensor([[5], [200]]))
    assert plan.places.flatten().tolist() == [5, 200 % (20 + ROLLBACK)]
    mask = plan.step_mask
    assert mask is not None and mask.shape == (2, 1, 1, 20 + ROLLBACK)
    assert mask[0, 0, 0].nonzero().flatten().tolist() == list(range(6))
    expected = sorted(t % (20 + ROLLBACK) for t in range(181, 201))
    assert mask[1, 0, 0].nonzero().flatten().tolist() == expected


def test_a_call_that_ends_early_is_undone() -> None:
    twin = Twin(20, 2, 0)
    twin.call(torch.ones(2, 30, dtype=torch.long))
    twin.cache.begin_forward(2, 40, None, torch.device("cpu"))
    twin.call(torch.ones(2, 3, dtype=torch.long))


def test_tokens_beyond_16_bits_are_refused() -> None:
    cache = KVQuantCache([None], unrotated, window=8)
    keys = torch.full((1, HEADS, 3, DIM), 1e6)
    cache.begin_forward(1, 3, None, torch.device("cpu"))
    table = unrotated(torch.zeros(1, 3))
    with pytest.raises(NonFiniteTokens, match="keys"):
        cache.attend(0, keys, keys, keys, table, 1.0, lambda *_, **__: keys.transpose(1, 2))


def test_another_dtype_than_before_is_refused() -> None:
    cache = KVQuantCache([None], unrotated, window=8)

    def call(dtype: torch.dtype) -> None:
        x = torch.ones((1, HEADS, 3, DIM), dtype=dtype)
        cache.begin_forward(1, 3, None, torch.device("cpu"))
        cache.attend(0, x, x, x, unrotated(torch.zeros(1, 3)), 1.0, lambda q, *_, **__: q.mT)

    call(torch.bfloat16)
    with pytest.raises(UserError, match=r"cache: dtype torch\.float16 in this call, but it holds"):
        call(torch.float16)


def test_masks_cover_what_such_a_layer_of_transformers_would_hold() -> None:
    twin = Twin(20, 1, 0)
    (layer,) = twin.cache.layers
    assert twin.cache.is_sliding == [True]
    assert layer.get_mask_sizes(7) == (7, 0)
    twin.call(torch.ones(1, 12, dtype=torch.long))
    assert layer.get_mask_sizes(7) == (19, 0)
    twin.call(torch.ones(1, 38, dtype=torch.long))
    assert layer.get_mask_sizes(torch.zeros(7)) == (19 + 7, 31)
    with pytest.raises(NotImplementedError, match="offloading"):
        layer.offload()


def test_a_window_is_needed_where_a_layer_has_no_codec() -> None:
    with pytest.raises(ValueError, match="window: needed where a layer has no codec"):
        KVQuantCache([None], unrotated)
