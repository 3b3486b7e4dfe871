"""Expansion of allocated codes against PyTorch: on a GPU, else emulated.

Also covers: kernels.allocated_tables.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.layout import Layout
from kvquant.cache.packed_past import block_table
from kvquant.kernels import cuda_expand_allocated
from kvquant.kernels.cuda_build import compile_cubin
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.triton_workspace import Held, Range, Workspace
from tests.kernels.emulate import emulate_expand
from tests.support.decode_case import allocated_case
from tests.support.past_case import PastCase, largest_error
from tests.support.rope import rope, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # half a unit in the last place, and signs


def filled(
    codec: Codec, lengths: list[int], kind: torch.dtype, dim: int, heads: int
) -> tuple[BlockStore, Layout]:
    """A store whose sequences were appended in two calls."""
    store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, 0)
    torch.manual_seed(len(lengths))
    for part in range(2):
        spans: list[Any] = [slice(0, n // 2 if part == 0 else n - n // 2) for n in lengths]
        shape = (2, len(lengths), heads, max(s.stop for s in spans), dim)
        keys, values = torch.randn(shape, device=DEVICE).to(kind)
        store.append(layout.append(spans), keys, values)
    for arena in store.arenas:
        arena.reserved = True
    store._reserved = True
    return store, layout


def expanded(
    store: BlockStore,
    layout: Layout,
    shape: DecodeShape,
    first: int,
    stop: int,
    kind: torch.dtype,
    *,
    simulated: bool = False,
) -> tuple[torch.Tensor, int]:
    """A range of blocks of all sequences, and the position of its first token.

    With `simulated` the tail stands for quantized tokens in fp32, as protocol B reads it.
    """
    view = layout.view()
    table = block_table(layout, view.blocks, torch.device(DEVICE))
    counts = zip(view.lengths, view.blocks, view.tails, strict=True)
    rows = [(min(layout.sinks, n), b, t, n) for n, b, t in counts]
    lengths = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    base = layout.sinks + first * shape.block_size if first else 0
    places = layout.sinks + stop * shape.block_size - base
    cos, sin = rope(torch.arange(max(view.lengths), device=DEVICE)[None], shape.head_dim)
    half = shape.head_dim // 2
    turns = (cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous())
    assert store.sinks is not None and store.tail is not None
    batch, heads = store.tail[0].shape[:2]
    workspace = Workspace(shape, batch, heads, places, kind, torch.device(DEVICE))
    workspace.data.fill_(float("nan"))
    arenas, tables = store.arena_table(), store.codec.past_tables
    assert arenas is not None and tables is not None
    part = Range(first, stop, base, places)
    tail = store.tail
    if simulated:
        faked = store.read_tail(view, fake=True)
        assert faked[0].dtype is torch.float32
        tail = (faked[0].contiguous(), faked[1].contiguous())
    workspace.expand(
        part, arenas, table, lengths, Held(store.sinks, tail), tables, turns, layout.sinks
    )
    data = workspace.data.float()
    order = tables.key_order.long()  # type: ignore[union-attr]
    keys = torch.full_like(data[0], float("nan"))
    data[0] = keys.scatter(3, order[:, None].expand_as(keys), data[0])
    return data, base


@pytest.mark.parametrize(
    ("dim", "size", "outliers", "kind", "value_range"),
    [
        (64, 64, 0.01, torch.float16, "token"),
        (128, 128, 0.0025, torch.float16, "token-head"),
        (128, 64, 0.0, torch.bfloat16, "token"),
        (256, 256, 0.02, torch.float16, "token"),
    ],
)
@pytest.mark.parametrize("sinks", [0, 1, 70])
def test_every_token_is_what_pytorch_reads(
    dim: int,
    size: int,
    outliers: float,
    kind: torch.dtype,
    value_range: Any,
    sinks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE == "cpu":
        emulate_expand(monkeypatch)
    heads = 3
    made = allocated_case(
        dim, 2, size, outliers, kind, heads, value_range=value_range, device=DEVICE
    )
    codec, shape = made[0], made[1]
    codec.sinks = sinks
    lengths = [2 * size + 70 + 17, sinks + size, 5, 1]
    store, layout = filled(codec, lengths, kind, dim, heads)
    view = layout.view()
    for first, stop, simulated in ((0, 3, False), (1, 2, False), (0, 3, True)):
        data, base = expanded(store, layout, shape, first, stop, kind, simulated=simulated)
        for row, length in enumerate(lengths):
            blocks = [store.unpack(a, slice(p, p + 1)) for a, p in layout.table[row]]
            tails = store.read_tail(view, fake=simulated)
            for i in range(2):
                assert store.sinks is not None
                held = store.sinks[i][row, :, : min(sinks, length)]
                parts = [held, *(b[i][0] for b in blocks), tails[i][row, :, : view.tails[row]]]
                expected = torch.cat([p.float() for p in parts], 1)
                assert expected.shape[1] == length
                if i == 0:
                    cos, sin = rope(torch.arange(length, device=DEVICE)[None], dim)
                    expected = rotate(expected, cos[0].float(), sin[0].float())
                end = min(length, sinks + stop * size)
                if base >= end:
                    continue
                found = data[i, row, :, : end - base]
                torch.testing.assert_close(
                    found, expected[:, base:end], atol=TOLERANCE[kind], rtol=TOLERANCE[kind]
                )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dim", "group", "more"),
    [
        (64, 3, {}),
        (128, 1, {}),
        (128, 4, {}),
        (256, 8, {}),
        (64, 8, {"soft_cap": 0.8, "learned": True}),
    ],
)
def test_attention_over_a_past(
    dim: int, group: int, more: dict[str, Any], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several ranges, under both protocols, by Triton's attention."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        emulate_expand(monkeypatch)
    made = allocated_case(dim, group, 64, 0.01, torch.float16, heads=2, device=DEVICE)
    longest = 297 if DEVICE == "cuda" else 137  # several ranges either way
    lengths = [longest, 90, 1, 65]
    case = PastCase(lengths, 20, dim=dim, group=group, heads=2, size=64, codec=made[0], **more)
    if causal:
        begins = torch.tensor(case.lengths, device=DEVICE)[:, None] - 20
        case.positions = (begins + torch.arange(20, device=DEVICE)).clamp(min=0)
    found = case.attend(1, causal=causal)
    assert largest_error(found, case.reference(causal=causal)) < 6e-3


@pytest.mark.parametrize(
    ("dim", "arch"), [(64, "sm_90"), (128, "sm_80"), (128, "sm_90"), (256, "sm_80")]
)
def test_compiles_without_a_gpu(dim: int, arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    shape = DecodeShape(3, dim, 4, 64, torch.float16, True, 0.0025, allocated=True)
    text = cuda_expand_allocated.header(shape, 164 * 1024)
    assert len(compile_cubin("expand_allocated.cu", text, arch)) > 10_000
