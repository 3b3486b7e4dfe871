"""Attention over a packed past by the Triton kernels against attention in float64.

On a GPU, else under Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvquant.cache import packed_past
from kvquant.cache.block_store import BlockStore
from kvquant.cache.layout import Layout
from kvquant.cache.packed_past import Past, block_table, range_blocks
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.dispatch import use_triton_attention
from kvquant.models.loading import QuantizedModel, install_attention
from kvquant.quantization.nuq import fit
from kvquant.schemes.nuq import NuqCodec
from kvquant.schemes.registry import build_codecs
from kvquant.study.config import NuqScheme
from tests.conftest import tiny_model

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rope(positions: torch.Tensor, dim: int, factor: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Llama's table, `[1, n, dim]` each, computed in float64."""
    inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=positions.device).double() / dim)
    angles = positions[..., None].double() * inverse
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)


class Case:
    """A ragged past in a layer's store and a call over it.

    Args:
        lengths: Tokens of each sequence before the call.
        columns: Of the call.
        calls: Appends that fill the past; each that packs blocks makes an arena.
    """

    def __init__(
        self,
        lengths: list[int],
        columns: int,
        *,
        bits: int = 3,
        dim: int = 64,
        heads: int = 1,
        group: int = 1,
        size: int = 32,
        outliers: float = 0.01,
        sinks: int = 1,
        dtype: torch.dtype = torch.float16,
        cached: torch.dtype | None = None,
        calls: int = 3,
        factor: float = 1.0,
        device: torch.device = DEVICE,
    ) -> None:
        torch.manual_seed(bits * 100 + dim)
        tables = LayerQuantizer(
            torch.randn(heads, dim) * 0.3,
            torch.rand(heads, dim) + 2.2 if outliers else torch.full((heads, dim), 5.0),
            fit("nf", bits),
            fit("uniform", bits),
        ).to(device)
        spec = NuqScheme(kind="nuq", bits=bits, outliers=outliers, block_size=size, sinks=sinks)
        self.codec = NuqCodec(spec, tables)
        self.store, self.layout = BlockStore(self.codec), Layout(sinks, size, 0)
        self.dim, self.group, self.factor, self.lengths = dim, group, factor, lengths
        batch, longest = len(lengths), max(lengths)
        kind = cached or (torch.float16 if dtype is torch.float32 else dtype)
        x = torch.randn(2, batch, heads, longest, dim, device=device)
        x[0] += tables.key_zero[:, None]
        x[1, :, :, 3:4] += 7.0  # a token far from zero
        x[:, :, :, 5:6] = 0.25  # a constant one
        x = x.to(kind)
        each = -(-longest // calls)
        for first in range(0, longest, each):
            part = x[:, :, :, first : first + each]
            spans: list[Any] = [slice(0, min(max(n - first, 0), part.shape[3])) for n in lengths]
            self.store.append(self.layout.append(spans), part[0], part[1])
        # Blocks that filled an arena at once, whoever packed them, lie as kernels expect.
        assert all(a.reserved or a._adopted is not None for a in self.store.arenas)
        for arena in self.store.arenas:
            arena.reserved = True
        self.queries = torch.randn(batch, heads * group, columns, dim, device=device).to(dtype)
        self.own = torch.randn(2, batch, heads, columns, dim, device=device).to(dtype)
        begins = torch.tensor(lengths, device=device)[:, None]
        self.positions = begins + torch.arange(columns, device=device)

    def stored(self, row: int, *, fake: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 keys before RoPE and values `[heads, tokens, dim]` of a sequence."""
        view = self.layout.view()
        out = []
        blocks = [self.store.unpack(a, slice(p, p + 1)) for a, p in self.layout.table[row]]
        tails = self.store.read_tail(view, fake=fake)
        assert self.store.sinks is not None
        for i in range(2):
            sinks = self.store.sinks[i][row, :, : min(self.layout.sinks, view.lengths[row])]
            parts = [sinks, *(b[i][0] for b in blocks), tails[i][row, :, : view.tails[row]]]
            out.append(torch.cat([p.double() for p in parts], 1))
            assert out[-1].shape[1] == self.lengths[row]
        return out[0], out[1]

    def past(self, step: int, *, causal: bool = False) -> Past:
        """As :class:`KVQuantCache` makes it."""
        view = self.layout.view()
        kind = self.store.tail[0].dtype  # type: ignore[index]
        shape = self.codec.decode_shape(self.dim, self.group, kind)
        assert shape is not None
        table = block_table(self.layout, view.blocks, self.queries.device)
        assert table is not None

        def turns(p: torch.Tensor) -> Any:
            return rope(p, self.dim, self.factor)

        return Past.make(shape, self.layout, view, table, turns, step, causal=causal)

    def reference(self, *, causal: bool = False, valid: torch.Tensor | None = None) -> torch.Tensor:
        """float64 `[batch, columns, query heads, dim]`."""
        results = []
        for row, length in enumerate(self.lengths):
            keys, values = self.stored(row, fake=causal)
            device = keys.device
            cos, sin = rope(torch.arange(length, device=device)[None], self.dim, self.factor)
            keys = turn(keys, cos.double(), sin.double())
            columns = self.positions.shape[1]
            if causal:
                at = torch.arange(length, device=device)
                seen = at[None] <= self.positions[row][:, None]
            else:
                own = self.own[:, row].double()
                keys, values = torch.cat((keys, own[0]), 1), torch.cat((values, own[1]), 1)
                seen = torch.ones(columns, columns, device=device).tril().bool()
                if valid is not None:
                    seen &= (valid[row] >= 0)[None]
                seen = torch.cat((seen.new_ones(columns, length), seen), 1)
            keys, values = (x.repeat_interleave(self.group, 0) for x in (keys, values))
            scores = self.queries[row].double() @ keys.transpose(1, 2) * self.dim**-0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            results.append((weights @ values).transpose(0, 1))
        return torch.stack(results)

    def attend(
        self, step: int, *, causal: bool = False, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        own = None if causal else (self.own[0], self.own[1], valid)
        past = self.past(step, causal=causal)
        return past.attend(self.store, self.queries, self.positions, self.dim**-0.5, own)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number of a (sequence, column, head)."""
    assert torch.isfinite(found).all()
    size = expected.abs().amax(-1).clamp(min=0.05)
    return float(((found.double() - expected).abs().amax(-1) / size).max())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.02])
def test_ragged_past_and_own_tokens(bits: int, outliers: float) -> None:
    case = Case([97, 0, 1, 33, 64, 65, 66], 5, bits=bits, outliers=outliers)
    assert len(case.store.arenas) > 1
    expected = case.reference()
    assert error(case.attend(2), expected) < 6e-3


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("columns", [1, 7])
def test_grouped_queries(group: int, columns: int) -> None:
    case = Case([70, 41], columns, heads=2, group=group, dim=64)
    assert error(case.attend(1), case.reference()) < 6e-3


@pytest.mark.parametrize("dim", [32, 128, 256])
@pytest.mark.parametrize("size", [32, 64])
def test_head_dims_and_blocks(dim: int, size: int) -> None:
    case = Case([2 * size + 9, size], 3, dim=dim, size=size, heads=2, outliers=0.02)
    assert error(case.attend(1), case.reference()) < 6e-3


@pytest.mark.parametrize("sinks", [0, 5, 40])
def test_sinks_and_scaled_rope(sinks: int) -> None:
    case = Case([110, 3, 45], 4, sinks=sinks, factor=1.3, bits=4)
    assert error(case.attend(2), case.reference()) < 6e-3


def test_fp32_queries_keep_their_precision() -> None:
    case = Case([101, 40], 6, dtype=torch.float32, heads=2, group=2)
    assert error(case.attend(1), case.reference()) < 1e-5


@pytest.mark.parametrize("step", [1, 2, 50])
def test_protocol_b_reads_everything_quantized(step: int) -> None:
    case = Case([130, 67, 64, 20], 20, group=2, dtype=torch.float32)
    # The call's tokens are the last of those stored.
    begins = torch.tensor(case.lengths, device=DEVICE)[:, None] - 20
    case.positions = begins + torch.arange(20, device=DEVICE)
    found = case.attend(step, causal=True)
    assert error(found, case.reference(causal=True)) < 1e-5


def test_columns_that_are_no_tokens() -> None:
    case = Case([50, 35], 9, group=2, dtype=torch.float32)
    valid = case.positions.clone()
    valid[0, :4], valid[1, 2], valid[1, 7:] = -1, -1, -1
    assert error(case.attend(1, valid=valid), case.reference(valid=valid)) < 1e-5


def test_same_result_in_every_run() -> None:
    case = Case([150, 80], 5, outliers=0.02, heads=2)
    assert torch.equal(case.attend(1), case.attend(1))


def test_ranges_do_not_change_the_result() -> None:
    case = Case([140, 20], 3, dtype=torch.float32)
    torch.testing.assert_close(case.attend(1), case.attend(4), atol=1e-5, rtol=1e-5)


def test_long_block_with_wide_positions() -> None:
    case = Case([1024 + 40], 2, size=1024, dim=64, bits=2, calls=1)
    assert case.store.arenas[0].sparse["keys"].count.dtype is torch.int32
    assert error(case.attend(3), case.reference()) < 6e-3


def test_workspace_is_bounded() -> None:
    shape = DecodeShape(3, 128, 1, 64, torch.float16, True)
    for sequences_heads in (1, 8, 512, 100_000):
        tokens = range_blocks(sequences_heads, shape, 2) * 64
        taken = 4 * sequences_heads * 128 * tokens
        assert tokens <= packed_past.MOST_TOKENS
        assert taken <= packed_past.MOST_BYTES or tokens == packed_past.LEAST_TOKENS
    assert range_blocks(100_000, replace(shape, block_size=1024), 2) == 1


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = DecodeShape(3, 128, 1, 64, torch.float16, True)
    query = torch.zeros(1, 1, 1, 128)
    monkeypatch.setenv("KVQUANT_KERNELS", "auto")
    assert not use_triton_attention(shape, query)
    monkeypatch.setenv("KVQUANT_KERNELS", "triton")
    assert use_triton_attention(shape, query)
    assert not use_triton_attention(replace(shape, head_dim=80), query)
    monkeypatch.setenv("KVQUANT_KERNELS", "pytorch")
    assert not use_triton_attention(shape, query)


@torch.inference_mode()
def logits(qm: QuantizedModel, ids: torch.Tensor, mask: Any, chunks: list[int], proto: Any) -> Any:
    cache, out, at = qm.new_cache(proto), [], 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    used = 0
    for size in chunks:
        part = slice(at, at + size)
        result = qm.model(
            input_ids=ids[:, part],
            attention_mask=mask[:, : at + size],
            position_ids=places[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        used += bool(cache._reader._past)
        out.append(result.logits)
        at += size
    return torch.where(mask[..., None].bool(), torch.cat(out, 1), 0), used


# Few tokens: packing outliers takes a second a block in the interpreter.
@pytest.mark.parametrize(
    ("proto", "padded", "outliers"),
    [("A", True, 0.02), ("A", False, 0.0), ("B", True, 0.0), ("B", False, 0.02)],
)
def test_model_gives_the_logits_of_the_pytorch_path(
    proto: Any, padded: bool, outliers: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(heads=2, kv_heads=1, head_dim=64).to(DEVICE)
    tables = [
        LayerQuantizer(
            torch.randn(1, 64) * 0.05, torch.rand(1, 64) * 0.2 + 0.3, fit("nf", 3), fit("nf", 3)
        ).to(DEVICE)
    ] * 2
    spec = NuqScheme(kind="nuq", bits=3, block_size=32, outliers=outliers)
    install_attention(model)
    qm = QuantizedModel(model, None, spec, build_codecs(spec, 2, tables))
    ids = torch.randint(0, 97, (2, 54), device=DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :40] = 0
    chunks = [36, 7, 1, 10]
    found = {}
    for kernels in ("triton", "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        found[kernels], used = logits(qm, ids, mask, chunks, proto)
        expected = len(chunks) - (proto == "A")
        assert used == (expected if kernels == "triton" else 0)
    torch.testing.assert_close(found["triton"], found["pytorch"], atol=1e-4, rtol=1e-4)


GPU = [
    # bits, dim, heads, group, size, outliers, lengths, columns, dtype
    (3, 128, 16, 1, 64, 0.01, [4096, 3000, 4095, 17], 512, torch.float16),
    (2, 128, 4, 4, 64, 0.02, [4096, 5000], 512, torch.bfloat16),
    (4, 256, 4, 2, 64, 0.01, [2000, 1024], 300, torch.float16),
    (4, 256, 2, 8, 32, 0.01, [2000], 129, torch.bfloat16),
    (3, 64, 8, 3, 128, 0.01, [1500, 4097, 0], 200, torch.float16),
    (3, 64, 8, 7, 1024, 0.0, [5000, 900], 64, torch.bfloat16),
    (3, 128, 8, 4, 64, 0.01, [16384], 1, torch.float16),
    (3, 128, 8, 12, 64, 0.01, [9000, 12], 1, torch.float16),
]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("given", GPU, ids=lambda g: f"{g[0]}bit-{g[1]}x{g[2]}x{g[3]}-{g[7]}")
def test_large_shapes_on_a_gpu(given: Any) -> None:
    bits, dim, heads, group, size, outliers, lengths, columns, dtype = given
    case = Case(
        lengths, columns, bits=bits, dim=dim, heads=heads, group=group, size=size,
        outliers=outliers, dtype=dtype,
    )  # fmt: skip
    bound = 8e-3 if dtype is torch.float16 else 5e-2
    for step in (16, 1 << 20):
        found = case.attend(step)
        assert error(found, case.reference()) < bound
        assert torch.equal(found, case.attend(step))
