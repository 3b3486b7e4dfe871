"""Prompt batches: lengths, padding, determinism."""

from __future__ import annotations

import pytest
import torch

from kvquant.benchmarks.prompts import prompt_batch, prompt_lengths
from kvquant.errors import UserError
from kvquant.study.timing import Workload

CPU = torch.device("cpu")
TEXT = list(range(100, 197))


@pytest.mark.parametrize(
    ("prompt", "batch", "ragged", "expected"),
    [
        (512, 3, True, [512, 384, 256]),
        (512, 2, True, [512, 256]),
        (512, 1, True, [512]),
        (512, 3, False, [512, 512, 512]),
        (7, 4, True, [7, 6, 4, 3]),
        (1, 3, True, [1, 1, 1]),
    ],
)
def test_lengths(prompt: int, batch: int, ragged: bool, expected: list[int]) -> None:
    workload = Workload(prompt=prompt, batch_size=batch, ragged=ragged)
    assert prompt_lengths(workload) == expected


def test_padding_is_on_the_left() -> None:
    batch = prompt_batch(Workload(prompt=8, batch_size=3, ragged=True), TEXT, 0, CPU)
    assert batch.lengths == [8, 6, 4]
    assert batch.tokens == 18 == int(batch.mask.sum())
    assert batch.padded
    for row, length in enumerate(batch.lengths):
        assert batch.mask[row].tolist() == [0] * (8 - length) + [1] * length
        assert batch.positions[row, 8 - length :].tolist() == list(range(length))
        assert not batch.positions[row, : 8 - length].any()


def test_ids_depend_on_the_seed_alone() -> None:
    workload = Workload(prompt=64, batch_size=2)
    torch.manual_seed(1)
    first = prompt_batch(workload, TEXT, 3, CPU)
    torch.manual_seed(2)
    assert torch.equal(first.ids, prompt_batch(workload, TEXT, 3, CPU).ids)
    assert not torch.equal(first.ids, prompt_batch(workload, TEXT, 4, CPU).ids)
    assert not first.padded


def test_prompts_are_pieces_of_the_text() -> None:
    batch = prompt_batch(Workload(prompt=70, batch_size=20), TEXT, 0, CPU)
    for row in batch.ids.tolist():
        start = TEXT.index(row[0])
        assert row == [TEXT[(start + i) % len(TEXT)] for i in range(70)]
    assert len({row[0] for row in batch.ids.tolist()}) > 5


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="--data-manifest: the text has no token"):
        prompt_batch(Workload(prompt=8), [], 0, CPU)
