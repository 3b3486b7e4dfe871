"""Lengths of a workload's prompts (torch-free: records are held against them)."""

from __future__ import annotations

from kvquant.study.timing import Workload


def prompt_lengths(workload: Workload) -> list[int]:
    """Tokens of each prompt: all equal, or falling evenly from `prompt` to half of it.

    Example: prompt 512, batch 3, ragged: 512, 384, 256.
    """
    n, longest = workload.batch_size, workload.prompt
    if not workload.ragged or n == 1:
        return [longest] * n
    shortest = max(1, longest // 2)
    return [longest - round(i * (longest - shortest) / (n - 1)) for i in range(n)]
