"""Decode attention over the packed cache against fp16 attention of the same shape.

Both sides alternate in one process as CUDA graphs, so that the time is the GPU's and not the
host's. Each call reads another layer's memory, as in a model, so that the L2 cache does not help.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvquant.cache.arena import Arena
from kvquant.cache.codec import Codec, Packed
from kvquant.kernels.backends import demand
from kvquant.kernels.cuda_decode import DecodeStep, decode_attention
from kvquant.kernels.decode_tables import RopeTables

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
COPIED = 1 << 28  # bytes of the copy, far beyond the L2 cache
SAMPLE = 64  # blocks that are quantized; the others are copies of them


@dataclass(frozen=True)
class DecodeTimes:
    """Holds the results of :func:`measure_decode`, with sides "kvquant", "copy" and of BACKENDS.

    Attributes:
        ms: Milliseconds per call by side and round.
        nbytes: Bytes that a call of each side reads; a copy reads and writes them.
        refused: Reasons why backends did not run, by name.
    """

    ms: dict[str, list[float]]
    nbytes: dict[str, int]
    refused: dict[str, str]


def refusal_of(work: Callable[[], object]) -> str | None:
    """Runs `work` and returns why a backend of torch's attention refused it, or None.

    Torch gives its reasons as warnings.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            work()
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            said = [str(w.message).split(" (Triggered")[0] for w in caught]
            why = [text for text in said if not text.endswith(("because:", "runtime disabled."))]
            return " ".join([first, *dict.fromkeys(why)])
    return None


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Captures `work` as a CUDA graph after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def graph_rounds(
    graphs: dict[str, torch.cuda.CUDAGraph], rounds: int, calls: dict[str, int]
) -> dict[str, list[float]]:
    """Replays graphs in turns and returns milliseconds per call by graph and round.

    Args:
        graphs: Graphs by name.
        rounds: Number of counted rounds; three more are a warm-up.
        calls: Number of calls in each graph.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 3):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / calls[name])
    return {name: values[3:] for name, values in times.items()}


def packed_layer(codec: Codec, heads: int, dim: int, blocks: int, device: str) -> Arena:
    """Returns an arena with `blocks` blocks of normally distributed data."""
    size = codec.block_size
    few = min(blocks, SAMPLE)
    x = torch.randn(2, few, heads, size, dim, device=device).half()
    packed = codec.pack(x[0], x[1])
    copies = math.ceil(blocks / few)
    dense = {
        name: t.repeat(copies, *[1] * (t.dim() - 1))[:blocks] for name, t in packed.dense.items()
    }
    sparse = {}
    for name, slab in packed.sparse.items():
        shift = torch.arange(copies, device=device, dtype=torch.int32) * slab.values.numel()
        begin = (slab.begin[None] + shift[:, None, None]).flatten(0, 1)[:blocks]
        sparse[name] = type(slab)(
            begin.contiguous(),
            slab.count.repeat(copies, 1)[:blocks].contiguous(),
            slab.positions.repeat(copies),
            slab.values.repeat(copies),
            (blocks, *slab.shape[1:]),
        )
    return Arena(blocks, Packed(dense, sparse))


def measure_decode(
    codec: Codec,
    heads: int,
    kv_heads: int,
    dim: int,
    batch: int,
    tokens: int,
    *,
    rounds: int = 20,
    device: str = "cuda",
) -> DecodeTimes:
    """Measures decode attention of one layer at one shape, beside a copy on the device.

    Args:
        codec: The scheme's codec for one layer, on the device.
        heads: Number of query heads.
        kv_heads: Number of kv heads.
        dim: Channels per head.
        batch: Number of sequences.
        tokens: Tokens per sequence, a multiple of the block size.
        rounds: Number of counted rounds.
        device: The GPU.
    """
    block_size = codec.block_size
    blocks = batch * tokens // block_size
    each = tokens // block_size
    whole = codec.cache_shape(dim, kv_heads, heads, torch.float16)
    demand("decode", "cuda", whole, torch.device(device))
    shape = whole.decode_shape
    # Enough layers that their packed bytes exceed the L2 cache several times.
    arenas = [packed_layer(codec, kv_heads, dim, blocks, device)]
    layers = max(1, min(16, math.ceil(4e8 / arenas[0].nbytes)))
    arenas += [packed_layer(codec, kv_heads, dim, blocks, device) for _ in range(layers - 1)]
    rows = [torch.tensor([a.addresses], device=device) for a in arenas]
    table = torch.arange(blocks, dtype=torch.int32, device=device).view(batch, each)
    lengths = torch.tensor([[1, each, 1]] * batch, dtype=torch.int32, device=device)

    def rope(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
        angles = positions[..., None] * inverse
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    chunks = each * (block_size // shape.chunk)
    turns = RopeTables.make(rope, shape.chunk, 1, chunks + 1, table, allocated=shape.allocated)
    step = DecodeStep(table, lengths, chunks, turns)
    query = torch.randn(batch, heads, dim, device=device).half()
    sinks = tuple(torch.randn(batch, kv_heads, 1, dim, device=device).half() for _ in range(2))
    tail = tuple(
        torch.randn(batch, kv_heads, block_size, dim, device=device).half() for _ in range(2)
    )
    scaling = 1 / math.sqrt(dim)

    def ours() -> None:
        for row in rows:
            decode_attention(
                shape,
                query,
                (sinks[0], sinks[1]),
                (tail[0], tail[1]),
                row,
                step,
                codec.decode_tables,
                scaling,
            )

    graphs = {"kvquant": capture(ours)}
    full = [
        torch.randn(2, batch, kv_heads, tokens, dim, device=device, dtype=torch.float16)
        for _ in range(min(layers, 4))
    ]
    refused = {}
    for name, backend in BACKENDS.items():

        def theirs(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                for i in range(layers):
                    keys, values = full[i % len(full)]
                    torch.nn.functional.scaled_dot_product_attention(
                        query[:, :, None], keys, values, enable_gqa=heads != kv_heads
                    )

        if reason := refusal_of(theirs):
            refused[name] = reason
        else:
            graphs[name] = capture(theirs)
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    graphs["copy"] = capture(lambda: target.copy_(source))
    calls = {**dict.fromkeys(graphs, layers), "copy": 1}
    packed = sum(a.nbytes for a in arenas) // layers
    nbytes = {**dict.fromkeys(BACKENDS, full[0].nbytes), "kvquant": packed, "copy": 2 * COPIED}
    return DecodeTimes(graph_rounds(graphs, rounds, calls), nbytes, refused)
