"""Attention with masks and soft-capped scores, beside its definition."""

from __future__ import annotations

import pytest
import torch

from kvquant.kernels import masked_attention as module
from kvquant.kernels.blockwise_attention import BlockwiseAttention
from kvquant.kernels.masked_attention import causal_mask, masked_attention


def case(length: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Queries of 4 heads, keys and values of 2, and a mask that hides half of the keys."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, length, 8, generator=generator)
    both = torch.randn(2, 2, 2, keys, 8, generator=generator)
    mask = torch.rand(2, 1, length, keys, generator=generator) < 0.5
    mask[..., 0] = True
    return queries, both[0], both[1], mask


def plain(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    soft_cap: float | None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition."""
    keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
    scores = 0.9 * queries @ keys.mT
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    scores = torch.where(mask, scores, -torch.inf)
    if sink_logits is not None:  # one more key, whose value is zero
        scores = torch.cat((scores, sink_logits.view(1, -1, 1, 1).expand_as(scores[..., :1])), -1)
        values = torch.cat((values, torch.zeros_like(values[:, :, :1])), 2)
    weights = scores.softmax(-1)
    return (weights @ values).transpose(1, 2)


SINKS = torch.tensor([-1.5, 0.5, 3.0, 90.0])
sinks_or_none = pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])


@sinks_or_none
@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("length", [1, 7])
def test_a_mask_says_which_keys_a_query_sees(
    length: int,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_QUERIES", 3)
    queries, keys, values, mask = case(length, 11)
    expected = plain(queries, keys, values, mask, soft_cap, sinks)
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    for given in (mask, added):
        found = masked_attention(queries, keys, values, given, 0.9, soft_cap, sinks)
        torch.testing.assert_close(found, expected)
    every = torch.ones_like(mask)
    found = masked_attention(queries, keys, values, None, 0.9, soft_cap, sinks)
    torch.testing.assert_close(found, plain(queries, keys, values, every, soft_cap, sinks))


def test_scores_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values, mask = case(7, 11)
    expected = plain(queries, keys, values, mask, None, SINKS)
    for most in (1, 3 * 2 * 4 * 11):  # a query at a time, and three
        monkeypatch.setattr(module, "MAX_SCORES", most)
        found = masked_attention(queries, keys, values, mask, 0.9, None, SINKS)
        torch.testing.assert_close(found, expected)


@sinks_or_none
@pytest.mark.parametrize("soft_cap", [None, 0.5])
def test_gradients_pass_through(soft_cap: float | None, sinks: torch.Tensor | None) -> None:
    queries, keys, values, mask = case(5, 5)
    slopes = []
    for ours in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in (queries, keys, values))
        logits = None if sinks is None else sinks.clone().requires_grad_()
        if ours:
            out = masked_attention(q, k, v, mask, 0.9, soft_cap, logits)
        else:
            out = plain(q, k, v, mask, soft_cap, logits)
        out.square().sum().backward()
        slopes.append([x.grad for x in (q, k, v, logits) if x is not None])
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)


@sinks_or_none
def test_pieces_of_a_past_are_capped_before_they_are_masked(sinks: torch.Tensor | None) -> None:
    """And sinks take their share once, however many pieces there are."""
    queries, keys, values, _ = case(6, 6)
    positions = torch.arange(6).expand(2, -1)
    attention = BlockwiseAttention(queries, positions, 2, 0.9, soft_cap=0.5, sink_logits=sinks)
    for part in (slice(0, 2), slice(2, 6)):
        attention.add(keys[:, :, part], values[:, :, part], positions[:, part])
    mask = causal_mask(6, queries.device)
    expected = plain(queries, keys, values, mask, 0.5, sinks)
    torch.testing.assert_close(attention.result(), expected)
