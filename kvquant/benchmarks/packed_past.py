"""Attention of a chunk of queries over a packed past: kernels, PyTorch path and fp16 backends.

    python -m kvquant.benchmarks.packed_past --heads 32 --kv-heads 8 --past 16384 --chunk 512

The sides alternate in one process. Each starts with its past in memory and ends with the outputs of
one layer. `expand` is the part of the kernels' time that decodes codes to 16-bit keys and values.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvquant.benchmarks.decode import packed_layer, refusal_of
from kvquant.benchmarks.timing import Clock, interleave, summarize
from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.layout import Layout
from kvquant.cache.packed_past import Past, block_table, range_blocks
from kvquant.cache.past_pieces import MAX_SCORES, MAX_TOKENS
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.rope import rotate
from kvquant.kernels.backends import demand
from kvquant.kernels.blockwise_attention import BlockwiseAttention
from kvquant.quantization.nuq import fit
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import NuqScheme

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class ContinuationTimes:
    """Holds the results of :func:`measure_continuation`.

    Attributes:
        ms: Milliseconds by side and round, for "kernels", "expand" (the part of their time that
            decodes codes to 16-bit keys and values), "pytorch" and those of BACKENDS; empty if
            memory ran out.
        refused: Reasons why backends did not run, by name.
        peak_bytes: Peak memory of each side above its start.
        nbytes: Bytes of the past, "packed" and "fp16".
        largest_difference: Largest difference between outputs of the kernels and the PyTorch path.
    """

    ms: dict[str, list[float]]
    refused: dict[str, str]
    peak_bytes: dict[str, int]
    nbytes: dict[str, int]
    largest_difference: float


def _rope(dim: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def table(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=positions.device) / dim)
        angles = positions[..., None] * inverse
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    return table


def _packed_past(
    codec: Codec, batch: int, heads: int, dim: int, past: int, device: torch.device
) -> tuple[BlockStore, Layout]:
    """Returns a store with `past` tokens per sequence (a sink, blocks, a tail) and its layout."""
    store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, 0)
    plan = layout.append([slice(0, past)] * batch)
    blocks = sum(plan.after.blocks)
    if blocks:
        arena = packed_layer(codec, heads, dim, blocks, str(device))
        arena.reserved = True  # full, and laid out as kernels read it
        store.arenas.append(arena)

    def held(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (2, batch, heads, tokens, dim)
        keys, values = torch.randn(shape, device=device, dtype=torch.float16)
        return keys, values

    store.sinks, store.tail = held(codec.sinks), held(codec.block_size)
    return store, layout


def _pieces(
    store: BlockStore,
    layout: Layout,
    queries: torch.Tensor,
    own: torch.Tensor,
    positions: torch.Tensor,
    rope: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Runs the PyTorch path of :class:`~kvquant.cache.block_layer.BlockLayer`, equal lengths."""
    assert store.sinks is not None and store.tail is not None
    batch, heads, size, dim = store.tail[0].shape
    view = layout.view()
    cos, sin = rope(torch.arange(view.lengths[0], device=queries.device)[None])
    attention = BlockwiseAttention(queries, positions, heads, dim**-0.5)

    def add(keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        where = slice(first, first + keys.shape[2])
        attention.add(rotate(keys.float(), cos[:, where], sin[:, where]), values, None)

    add(*store.sinks, 0)
    scores = MAX_SCORES // math.prod(queries.shape[:3])
    step = max(1, min(MAX_TOKENS, scores) // size)
    for first in range(0, view.blocks[0], step):
        stop = min(first + step, view.blocks[0])
        out = queries.new_zeros((2, batch, heads, stop - first, size, dim), dtype=torch.float32)
        for gather in layout.gather(view, first, stop, queries.device):
            for place, x in zip(out, store.unpack(gather.arena, gather.blocks), strict=True):
                gather.put(place, x)
        add(out[0].flatten(2, 3), out[1].flatten(2, 3), layout.sinks + first * size)
    if view.tails[0]:
        keys, values = store.read_tail(view, fake=False)
        add(keys, values, view.lengths[0] - view.tails[0])
    attention.add(own[0], own[1], positions)
    return attention.result()


def measure_continuation(
    codec: Codec,
    heads: int,
    kv_heads: int,
    dim: int,
    batch: int,
    past: int,
    chunk: int,
    rounds: int,
    *,
    max_seconds: float = 120.0,
    device: str = "cuda",
) -> ContinuationTimes:
    """Measures attention of new tokens over a packed past, for one layer at one shape.

    Args:
        codec: The scheme's codec for one layer, on the device.
        heads: Number of query heads.
        kv_heads: Number of kv heads.
        dim: Channels per head.
        batch: Number of sequences.
        past: Tokens per sequence in the cache, at least one block.
        chunk: New tokens per sequence; 1 is a decode step.
        rounds: Number of counted rounds.
        max_seconds: Seconds after which no further round starts.
        device: The GPU.
    """
    where = torch.device(device)
    store, layout = _packed_past(codec, batch, kv_heads, dim, past, where)
    rope = _rope(dim)
    whole = codec.cache_shape(dim, kv_heads, heads, torch.float16)
    demand("past", "triton", whole, where)
    shape = whole.decode_shape
    view = layout.view()
    table = block_table(layout, view.blocks, where)
    step = range_blocks(batch * kv_heads, shape, 2)
    queries = torch.randn(batch, heads, chunk, dim, device=where).half()
    own = torch.randn(2, batch, kv_heads, chunk, dim, device=where).half()
    positions = torch.arange(past, past + chunk, device=where).expand(batch, -1)
    scaling = dim**-0.5
    shared = Past.make(shape, layout, view, table, rope, step, causal=False)

    def kernels() -> torch.Tensor:
        return shared.attend(store, queries, positions, scaling, (own[0], own[1], None))

    def pieces() -> torch.Tensor:
        return _pieces(store, layout, queries, own, positions, rope)

    sides: dict[str, Callable[[], object]] = {
        "kernels": kernels,
        "expand": lambda: shared.expand(store, torch.float16),
        "pytorch": pieces,
    }
    refused: dict[str, str] = {}
    full = torch.randn(2, batch, kv_heads, past + chunk, dim, device=where, dtype=torch.float16)
    bias = causal_lower_right(chunk, past + chunk)
    for name, backend in BACKENDS.items():

        def theirs(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(
                    queries, full[0], full[1],
                    attn_mask=bias if chunk > 1 else None,  # type: ignore[arg-type]
                    enable_gqa=heads != kv_heads,
                )  # fmt: skip

        if reason := refusal_of(theirs):
            refused[name] = reason
        else:
            sides[name] = theirs
    difference = float((kernels().float() - pieces().float()).abs().max())
    clock = Clock.of(where)
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = dict.fromkeys(sides, 0)

    def timed(name: str, side: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            before = 0
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats(where)
                before = torch.cuda.memory_allocated(where)
            times[name].append(clock.time(side)[1])
            if where.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(where) - before)

        return call

    counted, fits = interleave(
        [timed(name, side) for name, side in sides.items()],
        warmup=3,
        iterations=rounds,
        max_seconds=max_seconds,
    )
    found = {
        name: times[name][-counted:] if fit_ else [] for name, fit_ in zip(sides, fits, strict=True)
    }
    nbytes = {"packed": store.nbytes, "fp16": full.nbytes}
    return ContinuationTimes(found, refused, peaks, nbytes, difference)


def _report(found: ContinuationTimes) -> dict[str, Any]:
    """Returns percentiles, and speed relative to the fastest fp16 backend and the PyTorch path."""
    ms = {name: summarize(times).model_dump() for name, times in found.ms.items() if times}
    medians = {name: each["median"] for name, each in ms.items()}
    fp16 = min((medians[name] for name in BACKENDS if name in medians), default=math.nan)
    ours = medians.get("kernels", math.nan)
    return {
        "ms": {name: ms.get(name, "oom") for name in found.ms},
        "refused": found.refused,
        "peak_bytes": found.peak_bytes,
        "packed_bytes": found.nbytes["packed"],
        "fp16_bytes": found.nbytes["fp16"],
        "largest_difference": found.largest_difference,
        "speed_over_fp16": fp16 / ours,
        "speed_over_pytorch": medians.get("pytorch", math.nan) / ours,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures one shape and prints or writes it as JSON."""
    parser = argparse.ArgumentParser(
        description="Time attention of a chunk over a packed past against PyTorch and fp16."
    )
    parser.add_argument("--heads", type=int, default=32, help="number of query heads")
    parser.add_argument("--kv-heads", type=int, default=32, help="number of kv heads")
    parser.add_argument("--dim", type=int, default=128, help="channels per head")
    parser.add_argument("--batch", type=int, default=1, help="number of sequences")
    parser.add_argument("--past", type=int, default=16384, help="tokens per sequence in the cache")
    parser.add_argument("--chunk", type=int, default=512, help="new tokens per sequence")
    parser.add_argument("--bits", type=int, default=3, help="bits per code: 2, 3 or 4")
    parser.add_argument("--block-size", type=int, default=64, help="tokens per block")
    parser.add_argument("--outliers", type=float, default=0.01, help="fraction of outliers")
    parser.add_argument("--rounds", type=int, default=20, help="number of counted rounds")
    parser.add_argument("--device", default="cuda", help="torch device")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: print it")
    args = parser.parse_args(arguments)
    levels = fit("nf", args.bits)
    shape = (args.kv_heads, args.dim)
    spec = NuqScheme(kind="nuq", bits=args.bits, outliers=args.outliers, block_size=args.block_size)
    tables = LayerQuantizer(torch.zeros(shape), torch.full(shape, 2.576), levels, levels)
    with torch.inference_mode():
        codec = NuqCodec(spec, tables.to(args.device))
        found = measure_continuation(
            codec, args.heads, args.kv_heads, args.dim, args.batch, args.past, args.chunk,
            args.rounds, device=args.device,
        )  # fmt: skip
    given = {k: v for k, v in vars(args).items() if k not in ("device", "out", "rounds")}
    text = json.dumps(given | _report(found), indent=2)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
