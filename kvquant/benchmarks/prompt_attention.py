"""Attention of a prompt with 8-bit products against torch's fp16 attention of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvquant.benchmarks.decode import BACKENDS, refusal_of
from kvquant.benchmarks.timing import Clock
from kvquant.benchmarks.turns import Side
from kvquant.errors import UserError
from kvquant.kernels.prompt_attention import attend
from kvquant.kernels.prompt_backend import select_prompt

OURS = "8-bit"
QUEUE = 2  # calls in a row, so that the device need not wait for the host in the second one


def prompt_sides(
    clock: Clock,
    device: torch.device,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    tokens: int,
) -> list[Side]:
    """Returns the sides: 8-bit attention with its quantization, and each backend of torch in fp16.

    Args:
        clock: Times the calls.
        device: A GPU.
        heads: Query heads.
        kv_heads: Key heads. Torch gets keys and values repeated for the heads of a group
            beforehand, which its fastest backend needs.
        head_dim: Channels per head.
        batch: Sequences.
        tokens: Tokens of each.

    Raises:
        UserError: No kernel attends in 8 bits on this device.
    """
    selection = select_prompt(head_dim, torch.float16, device)
    if selection.backend == "pytorch":
        raise UserError(". ".join(selection.lines()))
    shape = (batch, heads, tokens, head_dim)
    queries = torch.randn(shape, device=device, dtype=torch.float16)
    keys, values = (
        torch.randn((batch, kv_heads, *shape[2:]), device=device, dtype=torch.float16)
        for _ in range(2)
    )
    repeated = [x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values)]
    scaling = head_dim**-0.5

    def torch_attention(backend: str) -> torch.Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return scaled_dot_product_attention(
                queries, repeated[0], repeated[1], is_causal=True, scale=scaling
            )

    def run(work: Callable[[], object]) -> float:
        def calls() -> None:
            for _ in range(QUEUE):
                work()

        return clock.time(calls)[1] / QUEUE

    ours = partial(attend, queries, keys, values, scaling=scaling)
    sides = [Side(OURS, "ours", partial(run, ours))]
    for name in BACKENDS:
        side = Side(name, "fp16", partial(run, partial(torch_attention, name)))
        refused = refusal_of(partial(torch_attention, name))
        if refused is not None:
            side.status = "oom" if "out of memory" in refused else "refused"
            side.reason = refused
        sides.append(side)
    return sides
