"""Greedy generation: equal to transformers', whatever the batch, with honest bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.models import generation
from kvquant.models.generation import cut, end_ids, greedy, left_pad, share_out
from kvquant.models.loading import load_quantized_model
from kvquant.study.schemes import Fp16Scheme, KiviScheme
from tests.support.models import save_tiny

LENGTHS = [7, 41, 1, 23, 64]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = save_tiny(tmp_path_factory.mktemp("model"), positions=256)
    kivi = KiviScheme(kind="kivi", bits=4, group=16, residual=16)
    return {
        "fp16": load_quantized_model(folder, Fp16Scheme(kind="fp16"), device="cpu"),
        "kivi": load_quantized_model(folder, kivi, device="cpu"),
    }


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]


def test_equals_transformers_generate(models: dict[str, Any]) -> None:
    qm = models["fp16"]
    for prompt in prompts(LENGTHS):
        with torch.inference_mode():
            theirs = qm.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                past_key_values=qm.baseline_cache(),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        ours = greedy(qm, [prompt], 12, batch_size=1).tokens[0]
        assert ours == cut(theirs, end_ids(qm), None)[0]


def test_decode_steps_run_without_cudnn(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    qm = models["fp16"]
    seen: list[bool] = []
    forward = qm.model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(qm.model, "forward", watch)
    greedy(qm, [[3, 4, 5]], 4, batch_size=1, eos_ids=())
    assert seen == [True, False, False, False]


@pytest.mark.parametrize("scheme", ["fp16", "kivi"])
@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_answers_do_not_depend_on_the_batch(
    models: dict[str, Any], scheme: str, batch_size: int
) -> None:
    qm, given_prompts = models[scheme], prompts(LENGTHS)
    alone = greedy(qm, given_prompts, 10, batch_size=1)
    together = greedy(qm, given_prompts, 10, batch_size=batch_size)
    assert together.tokens == alone.tokens
    assert together.cache_elements == alone.cache_elements
    assert together.prompt_tokens == alone.prompt_tokens == sum(LENGTHS)


@pytest.mark.parametrize("scheme", ["fp16", "kivi"])
def test_ended_rows_leave_the_cache_and_change_no_answer(
    models: dict[str, Any], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qm, given_prompts = models[scheme], prompts([*LENGTHS, 30, 55])
    widths: list[int] = []
    forward = qm.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(qm.model, "forward", counting)
    options: dict[str, Any] = {"eos_ids": [], "stop": lambda t: t[-1] % 5 == 0}
    dropped = greedy(qm, given_prompts, 40, batch_size=7, **options)
    assert widths[0] == 7 and 0 < widths[-1] < 7
    assert widths == sorted(widths, reverse=True)
    monkeypatch.setattr("kvquant.models.generation.can_drop_rows", lambda cache: False)
    widths.clear()
    kept = greedy(qm, given_prompts, 40, batch_size=7, **options)
    assert set(widths) == {7}
    assert dropped == kept
    assert dropped.tokens == greedy(qm, given_prompts, 40, batch_size=1, **options).tokens


def test_out_of_gpu_memory_halves_the_batches(
    models: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    qm, given_prompts, sizes = models["fp16"], prompts(LENGTHS), []
    expected = greedy(qm, given_prompts, 8, batch_size=1)
    plain = generation._batch

    def small_card(qm: Any, batch: list[list[int]], *rest: Any) -> Any:
        sizes.append([len(prompt) for prompt in batch])
        if len(batch) * max(map(len, batch)) > limit:
            raise torch.cuda.OutOfMemoryError("no room")
        return plain(qm, batch, *rest)

    monkeypatch.setattr(generation, "_batch", small_card)
    limit = 130
    assert greedy(qm, given_prompts, 8, batch_size=8).tokens == expected.tokens
    # halved twice; what fits in the same number of tokens then goes together
    assert sizes == [[64, 41, 23, 7, 1], [64, 41, 23], [64, 41], [23, 7, 1]]
    assert "continuing with batches of 2 x 64" in capsys.readouterr().err
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        greedy(qm, given_prompts, 8, batch_size=8)


@pytest.mark.parametrize("scheme", ["fp16", "kivi"])
def test_tokens_of_a_batch_are_limited(
    models: dict[str, Any], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qm, given_prompts, sizes = models[scheme], prompts(LENGTHS), []
    expected = greedy(qm, given_prompts, 8, batch_size=1)
    plain = generation._batch
    seen: list[Any] = []

    def watched(qm: Any, batch: list[list[int]], *rest: Any) -> Any:
        sizes.append([len(prompt) for prompt in batch])
        return plain(qm, batch, *rest)

    monkeypatch.setattr(generation, "_batch", watched)
    found = greedy(qm, given_prompts, 8, batch_size=4, batch_tokens=50, on_batch=seen.append)
    assert sizes == [[64], [41], [23, 7], [1]]  # the first is too long for any company
    assert seen == [1, 2, 4, 5]
    assert found.tokens == expected.tokens
    assert found.row_elements == expected.row_elements


class Replayed:
    """Stands for a CUDA graph: steps of the model, known by their number."""

    def __init__(self, qm: Any, cache: Any, fail: dict[int, Exception]) -> None:
        self.qm, self.cache, self.fail, self.steps = qm, cache, fail, 0

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps in self.fail:
            raise self.fail[self.steps]
        return self.qm.model(input_ids=tokens, past_key_values=self.cache).logits[:, -1]


@pytest.mark.parametrize("fails", [None, "first", "later", "memory"])
def test_steps_of_a_graph_give_the_same_answers_or_are_done_without(
    models: dict[str, Any],
    fails: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    qm, given_prompts = models["kivi"], prompts([30] * 6)
    options: dict[str, Any] = {"batch_size": 3, "eos_ids": [], "stop": lambda t: t[-1] % 5 == 0}
    expected = greedy(qm, given_prompts, 30, **options)
    fail: dict[int, Exception] = {}
    if fails in ("first", "later"):
        fail[1 if fails == "first" else 4] = RuntimeError("capture failed\nlong story")
    if fails == "memory":
        fail[2] = torch.cuda.OutOfMemoryError("no room")
    made: list[Replayed] = []

    def graph(qm: Any, cache: Any, new_tokens: int) -> Replayed:
        assert new_tokens == 30
        made.append(Replayed(qm, cache, fail if not made else {}))
        return made[-1]

    monkeypatch.setattr(generation, "graphed", graph)
    found = greedy(qm, given_prompts, 30, **options)
    assert found.tokens == expected.tokens
    said = capsys.readouterr().err
    if fails in ("first", "later"):
        assert len(made) == 1  # not tried again
        assert "without a CUDA graph: capture failed\n" in said
    else:
        assert len(made) == (2 if fails is None else 4)  # halved: 2, 2, 2 after a failed 3
        assert "without" not in said
        assert all(decoder.steps > 2 for decoder in made[1:])
    made.clear()
    assert greedy(qm, given_prompts, 30, graph=False, **options).tokens == expected.tokens
    assert not made


def test_no_graph_on_a_cpu_or_for_short_answers(models: dict[str, Any]) -> None:
    qm = models["kivi"]
    assert generation.graphed(qm, qm.new_cache("A"), 1000) is None
    assert generation.graphed(qm, qm.new_cache("A"), 1) is None


@given(st.integers(0, 10**12), st.lists(st.integers(1, 9000), min_size=1, max_size=20))
def test_bytes_are_shared_out_exactly(total: int, weights: list[int]) -> None:
    shares = share_out(total, weights)
    assert sum(shares) == total and min(shares) >= 0
    for part, weight in zip(shares, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) <= 1.001


def test_counts_bytes_and_elements_of_the_prompt(models: dict[str, Any]) -> None:
    found = greedy(models["fp16"], prompts([30, 30]), 4, batch_size=2)
    assert found.cache_elements == 2 * 2 * 2 * 16 * 60  # K and V, layers, heads, dim, tokens
    assert found.cache_bytes == 2 * found.cache_elements
    ragged = greedy(models["fp16"], prompts([10, 30]), 4, batch_size=2)
    assert ragged.cache_elements == 2 * 2 * 2 * 16 * 40
    assert ragged.cache_bytes == found.cache_bytes  # padding is memory, but holds no element


def test_stop_ends_a_row_but_not_the_batch(models: dict[str, Any]) -> None:
    qm, given_prompts = models["fp16"], prompts(LENGTHS)
    free = greedy(qm, given_prompts, 12, batch_size=5, eos_ids=[]).tokens
    assert all(len(row) == 12 for row in free)
    stopped = greedy(
        qm, given_prompts, 12, batch_size=5, eos_ids=[], stop=lambda t: t[-1] % 2 == 0
    ).tokens
    for row, whole in zip(stopped, free, strict=True):
        assert row == whole[: len(row)]
        assert len(row) == 12 or row[-1] % 2 == 0
        assert all(token % 2 for token in row[:-1])


def test_no_new_tokens_is_a_plain_prefill(models: dict[str, Any]) -> None:
    assert greedy(models["fp16"], prompts([5, 9]), 0, batch_size=2).tokens == [[], []]
    assert greedy(models["fp16"], [], 4, batch_size=2).tokens == []


@pytest.mark.parametrize(
    ("given_prompts", "new", "message"),
    [
        ([[3, 4], []], 4, "prompt 1: is empty"),
        ([[3] * 250], 10, "256 positions"),
        ([[3]], -1, "max_new_tokens"),
    ],
)
def test_bad_prompts_are_named(
    models: dict[str, Any], given_prompts: list[list[int]], new: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        greedy(models["fp16"], given_prompts, new, batch_size=2)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_left_pad_keeps_every_prompt(rows: list[list[int]]) -> None:
    ids, mask = left_pad(rows, 0, torch.device("cpu"))
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, line, keep in zip(rows, ids, mask, strict=True):
        assert line[keep.bool()].tolist() == row
        assert not line[~keep.bool()].any()
        assert keep.diff().min() >= 0 if len(keep) > 1 else True  # padding only on the left


@given(st.lists(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.integers(0, 5))
def test_cut_does_not_depend_on_what_follows(tokens: list[int], ends: set[int], extra: int) -> None:
    kept, ended = cut(tokens, ends, lambda t: len(t) >= 7)
    assert kept == tokens[: len(kept)]
    assert not set(kept) & ends
    assert len(kept) <= 7
    if ended:
        assert cut(tokens + [1] * extra, ends, lambda t: len(t) >= 7) == (kept, True)
    else:
        assert kept == tokens
