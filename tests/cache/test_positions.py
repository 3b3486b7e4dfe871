"""Positions and masks of any kind, against transformers' own cache (every element exact).

Also covers: cache.call_rope, cache.kept_rope, cache.late_check, formats.rope.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvquant.cache.footprint import cache_nbytes
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.layout import Span
from kvquant.cache.positions import Shifts, shifts
from kvquant.errors import UserError
from kvquant.study.schemes import KvquantRefScheme
from tests.support.caches import EXACT, SPECS, ids, quantized, step
from tests.support.models import tiny_model

WIDTH = 70


def sharp_model(**extra: Any) -> Any:
    """Weights so large that a position that is off shows."""
    return tiny_model(initializer_range=0.3, **extra)


MODEL = sharp_model()
QM = quantized(MODEL, EXACT)


@torch.inference_mode()
def run(
    cache: Any, tokens: torch.Tensor, mask: Any, positions: list[Any], cuts: list[int], model: Any
) -> torch.Tensor:
    """Logits of calls that end at the columns `cuts`; a call's positions may be left out (None)."""
    out = []
    for (first, stop), where in zip(pairwise([0, *cuts]), positions, strict=True):
        out.append(
            model(
                input_ids=tokens[:, first:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=where,
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
    return torch.cat(out, 1)


def compare(
    tokens: torch.Tensor, mask: Any, positions: list[Any], cuts: list[int], qm: Any = QM
) -> KVQuantCache:
    """Logits of tokens are those of `DynamicCache` to the rounding to 16 bits."""
    cache = qm.new_cache()
    expected = run(DynamicCache(), tokens, mask, positions, cuts, qm.model)
    got = run(cache, tokens, mask, positions, cuts, qm.model)
    seen = torch.ones_like(tokens) if mask is None else mask
    right, found = expected[seen.bool()], got[seen.bool()]
    assert float((found - right).norm() / right.norm()) < 0.01
    assert isinstance(cache, KVQuantCache)
    return cache


def chunks(data: st.DataObject, width: int) -> list[int]:
    return sorted(data.draw(st.sets(st.integers(1, width), max_size=6)) | {width})


@pytest.mark.fault(
    "library",
    "any padding, chunks and positions",
    "as with the unquantized cache",
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_padding_chunks_and_positions(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from(["none", "left", "right", "any"]))
    tokens = ids(batch, WIDTH, data.draw(st.integers(0, 9)))
    mask = torch.ones(batch, WIDTH, dtype=torch.long)
    for row in range(1, batch):
        count = data.draw(st.integers(0, WIDTH - 1))
        if kind == "left":
            mask[row, :count] = 0
        elif kind == "right":
            mask[row, WIDTH - count :] = 0
        elif kind == "any":
            mask[row] = torch.randint(
                0, 2, (WIDTH,), generator=torch.Generator().manual_seed(count)
            )
    cuts = chunks(data, WIDTH)
    calls = list(pairwise([0, *cuts]))
    how = data.draw(st.sampled_from(["left out", "counted", "shifted", "per row", "jumps"]))
    where = (mask.cumsum(1) - 1).clamp(min=0)
    if how == "shifted":
        where = where + 100
    elif how == "per row":
        where = where + torch.randint(0, 90, (batch, 1))
    elif how == "jumps":
        where = torch.randint(1, 5, (batch, WIDTH)).cumsum(1)
    positions = [None if how == "left out" else where[:, a:b] for a, b in calls]
    given_mask = None if kind == "none" and data.draw(st.booleans()) else mask
    if given_mask is not None and data.draw(st.booleans()):
        given_mask = given_mask.bool()
    compare(tokens, given_mask, positions, cuts)


@pytest.mark.parametrize("spec", [EXACT, *SPECS[1:4]], ids=["exact", "nuq", "residual", "kivi"])
@pytest.mark.parametrize("how", ["left out", "shift", "jump"])
def test_all_kinds_of_caches_take_positions(spec: Any, how: str) -> None:
    """A shift changes nothing; a jump reads 16-bit tokens as transformers' cache does."""
    qm = quantized(sharp_model(), spec)
    tokens, cuts = ids(2, 20), [9, 10, 20]
    mask = torch.ones_like(tokens)
    if how == "left out":
        mask[1, :6] = 0
    where = torch.arange(20)[None] + (300 if how == "shift" else 0)
    if how == "jump":
        where = torch.where(where >= 7, where + 40, where)
    calls = list(pairwise([0, *cuts]))
    positions = [None if how == "left out" else where[:, a:b] for a, b in calls]
    compare(tokens, mask if how == "left out" else None, positions, cuts, qm)


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_a_shift_by_1000_is_no_matter(protocol: Any) -> None:
    """Of a quantized cache: relative distances are what counts."""
    qm = quantized(sharp_model(max_position_embeddings=4096), SPECS[1])
    tokens, cuts = ids(1, 150), [100, 101, 150]
    calls = list(pairwise([0, *cuts]))
    results = []
    for shift in (0, 1000):
        where = torch.arange(150)[None] + shift
        cache = qm.new_cache(protocol)
        results.append(run(cache, tokens, None, [where[:, a:b] for a, b in calls], cuts, qm.model))
        assert cache.kept_nbytes == 0
    assert float((results[1] - results[0]).norm() / results[0].norm()) < 0.02


def test_positions_left_out_then_counted() -> None:
    """Both say where a token is in its sequence: a left-padded prefill, then explicit steps."""
    tokens, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    where = (mask.cumsum(1) - 1).clamp(min=0)
    cuts = [30, 31, 40]
    calls = list(pairwise([0, *cuts]))
    positions = [None, *(where[:, a:b] for a, b in calls[1:])]
    got = run(QM.new_cache(), tokens, mask, positions, cuts, MODEL)
    explicit = [where[:, a:b] for a, b in calls]
    right = run(DynamicCache(), tokens, mask, explicit, cuts, MODEL)
    seen = mask.bool()
    assert float((got[seen] - right[seen]).norm() / right[seen].norm()) < 0.01


def test_kept_tables_are_counted_forked_selected_and_cropped() -> None:
    tokens, where = ids(2, 60), torch.arange(60)[None] * 2
    cache = QM.new_cache()
    with torch.inference_mode():
        MODEL(tokens[:, :40], position_ids=where[:, :40], past_key_values=cache)
    table = 2 * 2 * 40 * 8 * 4  # cosine and sine of two sequences, fp32
    assert cache.kept_nbytes == table
    plain = QM.new_cache()
    with torch.inference_mode():
        MODEL(tokens[:, :40], past_key_values=plain)
    assert cache_nbytes(cache) == cache_nbytes(plain) + table
    copied = cache.copy()
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([1]))
    full = run(DynamicCache(), tokens, None, [where], [60], MODEL)
    with torch.inference_mode():
        for held, rows, first in ((cache, slice(1, 2), 30), (copied, slice(0, 2), 40)):
            got = MODEL(
                tokens[rows, first:], position_ids=where[:, first:], past_key_values=held
            ).logits
            right = full[rows, first:]
            assert float((got - right).norm() / right.norm()) < 0.01
    cache.reset()
    assert cache.kept_nbytes == 0


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.fault(
    "library",
    "a chunk that crosses the original length of a dynamically scaled RoPE",
    "as with the unquantized cache",
)
@pytest.mark.parametrize("cuts", [[97, 98, 150], [40, 80, 150], [60, *range(61, 70)], [150]])
@pytest.mark.parametrize("protocol", ["A", "B"])
def test_dynamic_scaling_as_the_unquantized_model(cuts: list[int], protocol: Any) -> None:
    """A key keeps the rotation of its own call, also where a chunk crosses the original length."""
    model = sharp_model(max_position_embeddings=64, rope_parameters=DYNAMIC)
    qm = quantized(model, EXACT)
    tokens = ids(2, cuts[-1])
    expected, got = (
        run(cache, tokens, None, [None] * len(cuts), cuts, model)
        for cache in (DynamicCache(), qm.new_cache(protocol))
        if not step(model, DynamicCache(), ids(1, 1)).isnan().any()  # back to the original table
    )
    assert float((got - expected).norm() / expected.norm()) < 0.01


class TestMasks:
    def prompt(self) -> tuple[KVQuantCache, torch.Tensor]:
        cache, mask = QM.new_cache(), torch.ones(2, 20, dtype=torch.long)
        mask[1, :5] = 0
        step(MODEL, cache, ids(2, 20), mask)
        return cache, mask

    @pytest.mark.parametrize(
        ("row", "column", "words"),
        [
            (0, 3, "column 3 of sequence 0 was a token"),
            (1, 4, "column 4 of sequence 1 was padding"),
        ],
    )
    @pytest.mark.parametrize("new", [1, 7])
    def test_a_later_mask_must_not_change(
        self, row: int, column: int, words: str, new: int
    ) -> None:
        cache, mask = self.prompt()
        longer = torch.cat([mask, torch.ones(2, new, dtype=torch.long)], 1)
        changed = longer.clone()
        changed[row, column] = 1 - changed[row, column]
        with pytest.raises(ValueError, match=words):
            step(MODEL, cache, ids(2, new), changed)
        assert cache.lengths == [20, 15]  # as before: the right mask goes on
        plain = DynamicCache()
        step(MODEL, plain, ids(2, 20), mask)
        right = step(MODEL, plain, ids(2, new, 3), longer)
        got = step(MODEL, cache, ids(2, new, 3), longer)
        assert float((got - right).norm() / right.norm()) < 0.01

    def test_hidden_tokens_of_a_batch_without_padding(self) -> None:
        cache, mask = QM.new_cache(), torch.ones(2, 25, dtype=torch.long)
        step(MODEL, cache, ids(2, 20))
        mask[0, :4] = 0
        with pytest.raises(ValueError, match="column 0 of sequence 0 was a token"):
            step(MODEL, cache, ids(2, 5), mask)

    @pytest.mark.parametrize(
        ("mask", "words"),
        [
            (torch.ones(1, 1, 4, 4), r"shape \(1, 1, 4, 4\), expected \(1, 4\)"),
            (torch.ones(1, 3), r"shape \(1, 3\), expected \(1, 4\)"),
            (torch.tensor([[0.0, -3e38, 0.0, 0.0]]), "must be 1 for tokens and 0 for padding"),
            (torch.tensor([[1, 2, 1, 1]]), "must be 1 for tokens and 0 for padding"),
            (torch.full((1, 4), float("nan")), "must be 1 for tokens and 0 for padding"),
            (torch.zeros(1, 4), "a batch without a single token"),
        ],
    )
    @pytest.mark.parametrize("kind", ["blocks", "reference"])
    def test_masks_that_are_not_understood(self, mask: torch.Tensor, words: str, kind: str) -> None:
        qm = (
            QM
            if kind == "blocks"
            else quantized(tiny_model(), KvquantRefScheme(kind="kvquant-ref", bits=4))
        )
        with pytest.raises(ValueError, match=f"attention_mask: .*{words}"):
            step(qm.model, qm.new_cache(), ids(1, 4), mask)

    def test_a_mask_that_is_no_tensor(self) -> None:
        with pytest.raises(UserError, match="attention_mask: must be a tensor"):
            MODEL.model(ids(1, 4), {"full_attention": None}, past_key_values=QM.new_cache())

    def test_by_position_to_the_decoder(self) -> None:
        """A mask and a cache that are not named are seen as named ones are."""
        cache, mask = self.prompt()
        longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
        where = (longer.cumsum(1) - 1)[:, 20:]
        again, _ = self.prompt()
        with torch.inference_mode():
            MODEL.model(ids(2, 3), longer, where, cache)
            MODEL.model(ids(2, 3), attention_mask=longer, position_ids=where, past_key_values=again)
            assert cache.lengths == again.lengths == [23, 18]
            longer[1, 4] = 1
            with pytest.raises(ValueError, match="column 4 of sequence 1"):
                MODEL.model(ids(2, 1), torch.cat([longer, longer[:, :1]], 1), None, cache)


def test_embeddings_instead_of_tokens() -> None:
    tokens = ids(2, 30)
    expected, got = step(MODEL, QM.new_cache(), tokens), []
    cache = QM.new_cache()
    with torch.inference_mode():
        for part in MODEL.model.embed_tokens(tokens).split([20, 1, 9], 1):
            got.append(MODEL(inputs_embeds=part, past_key_values=cache).logits)
    assert float((torch.cat(got, 1) - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("where", [torch.arange(5), torch.zeros(3, 5), torch.zeros(1, 4)])
def test_positions_of_another_shape(where: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"position_ids: shape .* expected \(2, 5\)"):
        QM.new_cache().begin_forward(2, 5, None, torch.device("cpu"), where)


def test_shifts() -> None:
    whole: list[Span] = [slice(0, 3)] * 2
    assert shifts(torch.tensor([[5, 6, 7]]), whole, [5, 2]) == [0, 3]
    assert shifts(torch.tensor([[5, 7, 8]]), whole, [5, 2]) is None
    ragged: list[Span] = [slice(1, 3), torch.tensor([0, 2]), slice(0, 0)]
    assert shifts(torch.tensor([[9, 0, 1], [4, 9, 5], [1, 1, 1]]), ragged, [0, 3, 1]) == [
        0,
        1,
        None,
    ]
    default = Shifts([0, 0], True).follow([0, 4], [0, 0], given=False)
    assert default == Shifts([0, 4], True)
    assert default.follow([0, 4], [9, 5], given=True) == Shifts([0, 4], False)
    assert default.follow([0, 0], [9, 5], given=True) == Shifts([0, 0], False)
    assert default.follow([0, 2], [9, 5], given=True) is None
    assert Shifts([0, 0], False).follow([0, 4], [9, 5], given=False) is None
    assert Shifts([1, 2], False).select([1, 1]) == Shifts([2, 2], False)


def test_beyond_the_positions_of_the_model_is_warned_of() -> None:
    cache = QM.new_cache()
    step(MODEL, cache, ids(1, 500))
    with pytest.warns(UserWarning, match="520 columns, but the model is made for 512 positions"):
        step(MODEL, cache, ids(1, 20))


class TestStepsThatAreNotLookedAt:
    """A wrong decode step on a GPU is reported later, without waiting for it.

    On a CPU the same arithmetic runs where the cache is made to believe that looking would wait.
    """

    @pytest.fixture(autouse=True)
    def _pretend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvquant.cache.padding.on_device", lambda tensor: True)
        monkeypatch.setattr("kvquant.cache.call_rope.on_device", lambda tensor: True)
        monkeypatch.setattr("kvquant.cache.late_check.LateCheck.check", lambda self: None)

    def steps(self, how: str) -> tuple[KVQuantCache, torch.Tensor, torch.Tensor]:
        tokens, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
        if how != "unpadded":
            mask[1, :9] = 0
        where = (mask.cumsum(1) - 1).clamp(min=0) + (50 if how == "shifted" else 0)
        cuts = [30, *range(31, 41)]
        positions = [where[:, a:b] for a, b in pairwise([0, *cuts])]
        cache = QM.new_cache()
        got = run(cache, tokens, mask, positions, cuts, MODEL)
        right = run(DynamicCache(), tokens, mask, positions, cuts, MODEL)
        seen = mask.bool()
        assert float((got[seen] - right[seen]).norm() / right[seen].norm()) < 0.01
        assert isinstance(cache, KVQuantCache)
        assert cache.kept_nbytes == 0
        cache.settle()
        return cache, mask, where

    @pytest.mark.parametrize("how", ["unpadded", "padded", "shifted"])
    def test_right_steps(self, how: str) -> None:
        self.steps(how)

    @pytest.mark.parametrize("how", ["unpadded", "padded", "shifted"])
    @pytest.mark.parametrize("row", [0, 1])
    def test_wrong_masks(self, how: str, row: int) -> None:
        for column in (12, 40):  # a stored token, and the new column itself
            cache, mask, where = self.steps(how)
            longer = torch.cat([mask, mask[:, -1:]], 1)
            longer[row, column] = 0
            with torch.inference_mode():
                MODEL(
                    ids(2, 1),
                    attention_mask=longer,
                    position_ids=where[:, -1:] + 1,
                    past_key_values=cache,
                )
            with pytest.raises(ValueError, match="attention_mask: a decode step"):
                cache.settle()

    @pytest.mark.parametrize("how", ["unpadded", "padded", "shifted"])
    def test_wrong_positions(self, how: str) -> None:
        cache, mask, where = self.steps(how)
        with torch.inference_mode():
            MODEL(
                ids(2, 1),
                attention_mask=torch.cat([mask, mask[:, -1:]], 1),
                position_ids=where[:, -1:] + 3,
                past_key_values=cache,
            )
        with pytest.raises(ValueError, match="position_ids: a decode step"):
            cache.settle()
