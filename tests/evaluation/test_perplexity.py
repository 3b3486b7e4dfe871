"""Perplexity: windows, both protocols, and agreement with a plain forward pass."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.evaluation import perplexity
from kvquant.evaluation.base import Context
from kvquant.evaluation.divergence import divergence
from kvquant.evaluation.perplexity import measure_windows, run_perplexity, window_starts
from kvquant.study.sample_types import check_windows, perplexity_summary
from kvquant.study.samples import parse_samples
from kvquant.study.tasks import PerplexityTask
from tests.support.text import TEXT

LONG = TEXT * 30


def context(qm: Any, text: str = LONG) -> Context:
    return Context(qm, "ppl", lambda part: text)


def spec(**changes: Any) -> PerplexityTask:
    settings = {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": 3}
    return PerplexityTask(**{**settings, **changes})


@given(st.integers(1, 5000), st.integers(2, 300), st.integers(0, 6), st.integers(0, 2**31 - 1))
def test_windows_are_inside_and_apart(tokens: int, window: int, windows: int, seed: int) -> None:
    if tokens < window * max(windows, 1):
        with pytest.raises(UserError, match="window"):
            window_starts(tokens, window, windows, seed)
        return
    starts = window_starts(tokens, window, windows, seed)
    assert starts == window_starts(tokens, window, windows, seed)
    assert len(starts) == windows or windows == 0
    assert starts[0] >= 0 and starts[-1] + window <= tokens
    assert all(b - a >= window for a, b in itertools.pairwise(starts))
    if windows == 0:
        # All of the text, but for less than a window at each end.
        assert starts[0] < window and tokens - (starts[-1] + window) < window
        assert seed != 0 or starts[0] == 0


@pytest.mark.parametrize(("protocol", "chunk"), [("B", 64), ("A", 64), ("A", 17), ("A", 1)])
def test_unquantized_equals_a_plain_forward(tiny: Any, protocol: str, chunk: int) -> None:
    ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(2))
    losses = measure_windows(tiny, ids, protocol, chunk).nll  # type: ignore[arg-type]
    with torch.inference_mode():
        logits = tiny.model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses.shape == (1, 63)
    # The unquantized cache rounds to 16 bits.
    torch.testing.assert_close(losses[0], expected, rtol=0.02, atol=0.05)


def test_value_is_exp_of_the_mean_over_tokens(tiny: Any) -> None:
    found = run_perplexity(context(tiny), spec(), 1)
    total = math.fsum(row["nll"] for row in found.rows)
    tokens = sum(row["tokens"] for row in found.rows)
    assert found.value == pytest.approx(math.exp(total / tokens), rel=1e-12)
    assert (found.tokens, tokens, len(found.rows)) == (192, 189, 3)
    assert not found.higher_is_better
    assert 8 * found.cache_bytes / found.cache_elements == 16


def test_a_quantized_cache_changes_the_value_and_the_bits(tiny: Any, tiny_kivi: Any) -> None:
    plain = run_perplexity(context(tiny), spec(), 0)
    packed = run_perplexity(context(tiny_kivi), spec(), 0)
    assert packed.value != plain.value
    assert [row["start"] for row in packed.rows] == [row["start"] for row in plain.rows]
    assert packed.cache_elements == plain.cache_elements
    assert packed.cache_bytes < plain.cache_bytes


def test_repeatable(tiny_kivi: Any) -> None:
    first = run_perplexity(context(tiny_kivi), spec(protocol="A", chunk=16), 5)
    run_perplexity(context(tiny_kivi), spec(), 6)
    assert run_perplexity(context(tiny_kivi), spec(protocol="A", chunk=16), 5) == first


@pytest.mark.parametrize("protocol", ["A", "B"])
@pytest.mark.parametrize(("size", "tokens"), [(3, None), (16, None), (16, 200), (2, 1)])
def test_the_batch_size_changes_no_result(
    tiny_kivi: Any, protocol: Any, size: int, tokens: int | None
) -> None:
    settings: dict[str, Any] = {"windows": 7, "protocol": protocol, "chunk": 24}
    alone = run_perplexity(context(tiny_kivi), spec(**settings), 2)
    limited = replace(context(tiny_kivi), batch_tokens=tokens)
    found = run_perplexity(limited, spec(**settings, batch_size=size), 2)
    assert found.metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert found.value == pytest.approx(alone.value, rel=1e-6)
    tails = [
        sorted(value for row in rows for value in row.pop("kl_tail"))
        for rows in (found.rows, alone.rows)
    ]
    assert tails[0] == pytest.approx(tails[1], rel=1e-3, abs=1e-6)
    for row, expected in zip(found.rows, alone.rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert (found.cache_bytes, found.cache_elements) == (alone.cache_bytes, alone.cache_elements)
    assert found.tokens == alone.tokens


def test_out_of_memory_halves_the_batch_and_measures_each_window_once(
    tiny_kivi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_perplexity(context(tiny_kivi), spec(windows=7), 0)
    sizes: list[int] = []

    def small_card(qm: Any, ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(ids.shape[0])
        if ids.shape[0] > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return measure_windows(qm, ids, *rest, **options)

    monkeypatch.setattr(perplexity, "measure_windows", small_card)
    found = run_perplexity(context(tiny_kivi), spec(windows=7, batch_size=6), 0)
    assert sizes == [6, 3, 2, 2, 2, 1]
    assert [row["start"] for row in found.rows] == [row["start"] for row in alone.rows]
    assert found.value == pytest.approx(alone.value, rel=1e-6)
    assert found.cache_bytes == alone.cache_bytes


def test_a_scheme_that_mixes_sequences_gets_one_window_at_a_time(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny.scheme), "batches", False)
    sizes: list[int] = []

    def seen(qm: Any, ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(ids.shape[0])
        return measure_windows(qm, ids, *rest, **options)

    monkeypatch.setattr(perplexity, "measure_windows", seen)
    run_perplexity(context(tiny), spec(batch_size=8), 0)
    assert sizes == [1, 1, 1]


def test_bos_takes_the_place_of_the_first_token(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the same tokens are scored with it and without."""
    fed: list[torch.Tensor] = []

    def seen(qm: Any, ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        fed.append(ids)
        return measure_windows(qm, ids, *rest, **options)

    monkeypatch.setattr(perplexity, "measure_windows", seen)
    without, found = (run_perplexity(context(tiny), spec(bos=bos), 1) for bos in (False, True))
    plain, begun = torch.cat(fed[:3]), torch.cat(fed[3:])
    assert (begun[:, 0] == tiny.tokenizer.bos_token_id).all()
    assert torch.equal(begun[:, 1:], plain[:, 1:]) and not torch.equal(begun, plain)
    for field in ("start", "tokens"):
        assert [row[field] for row in found.rows] == [row[field] for row in without.rows]
    assert found.value != without.value
    check_windows(found.metrics, found.rows)


def test_bos_of_a_tokenizer_without_one_is_refused(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = copy.deepcopy(tiny.tokenizer)
    plain.bos_token = None
    monkeypatch.setattr(tiny, "tokenizer", plain)
    with pytest.raises(UserError, match=r"tasks\.ppl\.bos: .* no BOS token: leave bos out"):
        run_perplexity(context(tiny), spec(bos=True), 0)


def test_bos_counts_in_the_digest_where_it_is_chosen() -> None:
    assert "bos" not in spec().meaning() and spec(bos=True).meaning()["bos"] is True


def test_errors_name_the_field(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"tasks\.ppl\.window: 4096 tokens.* 2048 positions"):
        run_perplexity(context(tiny), spec(window=4096), 0)
    with pytest.raises(UserError, match=r"tasks\.ppl\.window: 3 windows of 64"):
        run_perplexity(context(tiny, "too short"), spec(), 0)


@pytest.mark.parametrize(("protocol", "chunk"), [("B", 64), ("A", 16)])
def test_kl_compares_whole_forward_passes(
    tiny: Any, tiny_kivi: Any, protocol: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 512, (1, 96), generator=torch.Generator().manual_seed(2))
    found = measure_windows(tiny_kivi, ids, protocol, chunk, kl=True)
    assert found.kl is not None and found.kl.shape == found.nll.shape == (1, 95)
    step = 96 if protocol == "B" else chunk
    logits = []
    for qm, cache in (
        (tiny, tiny.baseline_cache()),
        (tiny_kivi, tiny_kivi.new_cache(protocol)),
    ):
        with torch.inference_mode():
            parts = [
                qm.model(input_ids=ids[:, at : at + step], past_key_values=cache).logits[0]
                for at in range(0, 96, step)
            ]
        logits.append(torch.cat(parts)[:-1].double())
    expected = divergence(*logits)
    torch.testing.assert_close(found.kl[0], expected, rtol=1e-3, atol=1e-5)
    assert expected.mean() > 1e-4
    # Neither the reference pass nor the size of the pieces changes what is measured.
    assert torch.equal(measure_windows(tiny_kivi, ids, protocol, chunk).nll, found.nll)
    monkeypatch.setattr("kvquant.evaluation.perplexity.LOGIT_POSITIONS", 7)
    again = measure_windows(tiny_kivi, ids, protocol, chunk, kl=True)
    torch.testing.assert_close(again.kl, found.kl, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("protocol", "chunk"), [("B", 160), ("A", 160), ("A", 130)])
def test_kl_of_8_bit_attention_compares_with_16_bit_attention(
    tiny: Any, protocol: Any, chunk: int
) -> None:
    """Over the unquantized cache, where nothing else differs."""
    eight = replace(tiny, scheme=tiny.scheme.model_copy(update={"prompt_attention": "8-bit"}))
    ids = torch.randint(3, 512, (2, 160), generator=torch.Generator().manual_seed(2))
    found = measure_windows(eight, ids, protocol, chunk, kl=True)
    plain = measure_windows(tiny, ids, protocol, chunk, kl=True)
    assert found.kl is not None and 1e-7 < float(found.kl.mean()) < 0.05
    assert plain.kl is not None and not plain.kl.any()
    assert float((found.nll - plain.nll).abs().max()) > 1e-4
    assert found.cache_bytes == plain.cache_bytes


def test_kl_is_a_metric_beside_perplexity(tiny: Any, tiny_kivi: Any) -> None:
    plain, packed = (run_perplexity(context(qm), spec(), 0) for qm in (tiny, tiny_kivi))
    assert plain.metrics["kl"] == 0.0 and packed.metrics["kl"] > 0
    tokens = sum(row["tokens"] for row in packed.rows)
    assert packed.metrics["kl"] == pytest.approx(sum(r["kl"] for r in packed.rows) / tokens)
    assert plain.metrics["kl_p999"] == 0.0 and plain.metrics["top1_agreement"] == 1.0
    assert packed.metrics["kl"] < packed.metrics["kl_p99"] < packed.metrics["kl_p999"]
    assert 0.5 < packed.metrics["top1_agreement"] < 1
    for found in (plain, packed):
        read = parse_samples("".join(json.dumps(row) + "\n" for row in found.rows), "perplexity")
        assert perplexity_summary(read).metrics == found.metrics
        check_windows(found.metrics, read)
    without = run_perplexity(context(tiny_kivi), spec(kl=False), 0)
    assert without.metrics.keys() == {"perplexity", "nll", "window"}
    assert without.value == packed.value
    assert without.rows[0].keys() == {"index", "start", "tokens", "nll"}


def test_window_zero_takes_all_positions(tiny: Any) -> None:
    found = run_perplexity(context(tiny, TEXT * 60), spec(window=0, windows=1, kl=False), 0)
    assert found.metrics["window"] == 2048 and found.rows[0]["tokens"] == 2047
    with pytest.raises(ValueError, match="at least 32"):
        spec(window=31)
