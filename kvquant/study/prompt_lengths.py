"""Lengths of a workload's prompts, without torch, as records are checked against them."""

from __future__ import annotations

from kvquant.study.timing import Workload


def prompt_lengths(workload: Workload) -> list[int]:
    """Returns the tokens of each prompt: all equal, or falling evenly from `prompt` to half.

    For example, a ragged workload with prompt 512 and batch size 3 has lengths 512, 384 and 256.
    """
    n, longest = workload.batch_size, workload.prompt
    if not workload.ragged or n == 1:
        return [longest] * n
    shortest = max(1, longest // 2)
    return [longest - round(i * (longest - shortest) / (n - 1)) for i in range(n)]
