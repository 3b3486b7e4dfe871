"""Divergences from the unquantized cache: against plain loops over all tokens of a seed."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import NonFinite
from kvquant.evaluation import perplexity
from kvquant.evaluation.base import Context
from kvquant.evaluation.divergence import divergence, largest_by_window, same_top1
from kvquant.evaluation.perplexity import run_perplexity
from kvquant.study.sample_types import check_windows, perplexity_summary, tail_size
from kvquant.study.tasks import PerplexityTask

OUT = -math.inf


def test_divergence_is_torchs() -> None:
    torch.manual_seed(1)
    reference, logits = torch.randn(2, 40, 97) * 4
    expected = torch.nn.functional.kl_div(
        logits.double().log_softmax(-1),
        reference.double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    torch.testing.assert_close(
        divergence(reference, logits).double(), expected, rtol=1e-5, atol=1e-6
    )
    assert (divergence(reference, logits) > 0).all()
    assert divergence(logits, logits).abs().max() < 1e-6


def test_excluded_tokens() -> None:
    """Those of the reference add nothing, those of the measured distribution alone are infinite."""
    half = torch.tensor([0.0, 0.0, OUT])
    assert divergence(half, half) == 0
    # all of the reference's mass is on two tokens, which have 2/3 here
    assert float(divergence(half, torch.zeros(3))) == pytest.approx(math.log(1.5))
    assert divergence(torch.zeros(3), half) == math.inf
    assert divergence(torch.full((3,), OUT), half).isnan()
    assert divergence(torch.tensor([0.0, math.nan, OUT]), half).isnan()


def test_the_first_of_equal_logits_is_the_top() -> None:
    reference = torch.tensor([1.0, 1.0, 0.0, OUT])
    others = torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 0], [5, 4, OUT, OUT], [OUT, 0, 0, 0]])
    assert same_top1(reference.expand(4, 4), others).tolist() == [True, False, True, False]


class Fake:
    """A model that answers with given logits: those of its quantized or its unquantized cache."""

    approximates, device, max_positions, position_limit = True, "cpu", 4096, 4096
    scheme = SimpleNamespace(kind="fake", batches=True)
    dtype = torch.float32

    def __init__(self, ids: list[int], reference: torch.Tensor, measured: torch.Tensor) -> None:
        """Takes the text, and for each cache logits `[windows, window, vocabulary]`."""
        self.tokenizer = lambda text, **options: SimpleNamespace(input_ids=ids)
        self.model = SimpleNamespace(model=self._decode, get_output_embeddings=lambda: lambda h: h)
        self._sources = {"reference": iter(reference), "measured": iter(measured)}

    def new_cache(self, protocol: str) -> Any:
        return SimpleNamespace(layers=[], source=self._sources["measured"], logits=None, at=0)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def baseline_cache(self) -> Any:
        return SimpleNamespace(layers=[], source=self._sources["reference"], logits=None, at=0)

    def _decode(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        cache, (windows, tokens) = past_key_values, input_ids.shape
        if cache.logits is None:
            cache.logits = torch.stack([next(cache.source) for _ in range(windows)])
        cache.at += tokens
        hidden = cache.logits[:, cache.at - tokens : cache.at]
        return SimpleNamespace(last_hidden_state=hidden)


def measured(fake: Fake, **options: Any) -> Any:
    spec = PerplexityTask(**{"suite": "perplexity", "dataset": "essays", **options})
    return run_perplexity(Context(fake, "ppl", lambda part: "a text"), spec, 0)


def naive(reference: torch.Tensor, logits: torch.Tensor) -> tuple[list[float], list[bool]]:
    """Divergence and agreement of every scored token, by plain loops in float64."""
    divergences, agreed = [], []
    for mine, others in zip(reference.double(), logits.double(), strict=True):
        for p, q in zip(mine[:-1].tolist(), others[:-1].tolist(), strict=True):  # no next token
            sums = [math.log(math.fsum(math.exp(x) for x in row)) for row in (p, q)]
            terms = [
                math.exp(a - sums[0]) * (a - sums[0] - (b - sums[1]))
                for a, b in zip(p, q, strict=True)
                if a != OUT
            ]
            divergences.append(math.fsum(terms))
            agreed.append(p.index(max(p)) == q.index(max(q)))
    return divergences, agreed


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_metrics_are_those_of_plain_loops(data: st.DataObject) -> None:
    windows, window = data.draw(st.integers(1, 4)), data.draw(st.integers(32, 80))
    vocabulary = data.draw(st.integers(2, 9))
    excluded = data.draw(st.integers(0, vocabulary - 2))  # the last tokens, in both caches
    equal = data.draw(st.booleans())  # whole numbers, of which many are the largest logit
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    noise = data.draw(st.sampled_from([0.0, 0.3, 3.0]))
    reference = 3 * torch.randn(windows, window, vocabulary, generator=rng)
    logits = reference + noise * torch.randn(reference.shape, generator=rng)
    if equal:
        reference, logits = reference.round(), logits.round()
    reference[..., vocabulary - excluded :] = logits[..., vocabulary - excluded :] = OUT
    text = windows * window + data.draw(st.integers(0, window - 1))  # rest: no whole window
    ids = torch.randint(0, vocabulary - excluded, (text,), generator=rng).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "LOGIT_POSITIONS", data.draw(st.sampled_from([1, 7, 50, 512])))
        found = measured(
            Fake(ids, reference, logits),
            window=window,
            windows=data.draw(st.sampled_from([0, windows])),
            protocol=data.draw(st.sampled_from(["A", "B"])),
            chunk=data.draw(st.integers(1, 100)),  # the last one of a window is shorter
            batch_size=data.draw(st.integers(1, 5)),
        )
    divergences, agreed = naive(reference, logits)
    assert len(found.rows) == windows and found.tokens == windows * window
    expected = [np.mean(divergences), *np.percentile(divergences, [99, 99.9])]
    reported = [found.metrics[name] for name in ("kl", "kl_p99", "kl_p999")]
    assert reported == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.metrics["top1_agreement"] == np.mean(agreed)
    rows = json.loads(json.dumps(found.rows))
    assert perplexity_summary(rows).metrics == found.metrics
    check_windows(found.metrics, rows)


def test_a_token_that_only_the_quantized_cache_excludes_is_refused() -> None:
    reference = torch.zeros(1, 32, 4)
    logits = reference.clone()
    logits[0, 20, 3] = OUT
    fake = Fake([0] * 32, reference, logits)
    with pytest.raises(NonFinite, match="divergences from token 21 of window 0 on"):
        measured(fake, window=32)


SINGLE = st.floats(0, 30, width=32)
RAGGED = st.lists(st.lists(SINGLE | st.sampled_from([0.0, 2.5]), min_size=1), min_size=1)


@given(RAGGED, st.integers(1, 40))
def test_the_largest_are_kept_exactly_once(windows: list[list[float]], times: int) -> None:
    windows = [window * times for window in windows]
    pool = torch.tensor([value for window in windows for value in window])
    tails = largest_by_window(pool, [len(window) for window in windows])
    kept = sorted(np.float32(value) for tail in tails for value in tail)
    assert kept == sorted(pool.numpy())[-tail_size(len(pool)) :]
    for tail, window in zip(tails, windows, strict=True):
        assert tail == sorted(tail, reverse=True)
        left = [np.float32(value) for value in window]
        for value in tail:  # each stands in its window, as often as it is kept
            left.remove(np.float32(value))
    rows = [
        {"index": i, "start": 10**6 * i, "tokens": len(w), "nll": 1.0, "kl": math.fsum(w)}
        | {"kl_tail": tail, "top1_agreed": len(w)}
        for i, (w, tail) in enumerate(zip(windows, tails, strict=True))
    ]
    metrics = perplexity_summary(rows).metrics
    p99, p999 = np.percentile(pool.double().numpy(), [99, 99.9])
    assert metrics["kl_p99"] == pytest.approx(p99, rel=1e-6)
    assert metrics["kl_p999"] == pytest.approx(p999, rel=1e-6)
    check_windows(metrics, rows)


def test_equal_divergences_are_taken_from_the_first_windows() -> None:
    assert largest_by_window(torch.zeros(300), [100, 200]) == [[0.0] * 4, []]
    some = torch.tensor([1.0, 0, 2, 1, 1])
    assert largest_by_window(some, [2, 3]) == [[1.0], [2.0]]
