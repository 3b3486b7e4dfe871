"""KVQuant's procedure: nuq's numbers, standard arrays, growth by concatenation.

Also covers: schemes.growing_sparse, schemes.kvquant_layer, schemes.kvquant_store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.schemes import growing_sparse
from kvquant.schemes.kvquant_store import ReferenceTables, SequenceStore
from kvquant.schemes.nuq import NuqCodec
from kvquant.schemes.registry import ModelShape, build_caches
from kvquant.study.schemes import KvquantRefScheme, NuqScheme
from tests.support.caches import feed, ids, quantized, ragged, step
from tests.support.models import tiny_model
from tests.support.quantizers import narrow_quantizers


def filled(spec: KvquantRefScheme, keys: Any, values: Any, chunks: list[int]) -> SequenceStore:
    """Keys and values `[num_kv_heads, n, head_dim]`, appended in chunks; rotation left out."""
    table = narrow_quantizers(spec.bits, keys.shape[0], keys.shape[2])[0]
    store, at = SequenceStore(ReferenceTables(spec, table), keys[:, : chunks[0]]), 0
    for size in chunks:
        part = slice(at, at + size)
        store.append(keys[:, part], keys[:, part], values[:, part])
        at += size
    return store


def read(store: SequenceStore) -> tuple[torch.Tensor, torch.Tensor]:
    """All that is stored, `[num_kv_heads, n, head_dim]`."""
    parts = list(store.pieces())
    return torch.cat([p[1][0] for p in parts], 1), torch.cat([p[2][0] for p in parts], 1)


def data(tokens: int, heads: int = 2, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(heads, tokens, dim, generator=generator) * 0.25
    return keys.half(), torch.randn(heads, tokens, dim, generator=generator).half()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("chunks", [[97], [64, 1, 1, 31]], ids=["whole", "appends"])
def test_it_gives_back_the_numbers_of_nuq(bits: int, outliers: float, chunks: list[int]) -> None:
    keys, values = data(97)
    ref = KvquantRefScheme(kind="kvquant-ref", bits=bits, outliers=outliers, room=3)
    found = read(filled(ref, keys, values, chunks))
    nuq = NuqScheme(kind="nuq", bits=bits, outliers=outliers, block_size=32)
    codec = NuqCodec(nuq, narrow_quantizers(bits, 2, 64)[0])
    k, v = (x[None, :, 1:] for x in (keys, values))  # the first token is a sink
    shape = (3, 2, 32, 64)
    packed = codec.pack(*(x[0].unflatten(1, (3, 32)).transpose(0, 1).contiguous() for x in (k, v)))
    for mine, theirs, exact in zip(found, codec.unpack(packed, shape), (keys, values), strict=True):
        assert torch.equal(mine[:, 0], exact[:, 0].float())
        theirs = theirs.transpose(0, 1).reshape(2, 96, 64)
        # one is a level plus what it lacks, the other the number itself
        torch.testing.assert_close(mine[:, 1:], theirs, atol=1e-6, rtol=1e-6)


def test_pieces_of_a_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = data(75)
    spec = KvquantRefScheme(kind="kvquant-ref", bits=3, sinks=0)
    expected = read(filled(spec, keys, values, [75]))
    for module in ("growing_sparse", "kvquant_store"):
        monkeypatch.setattr(f"kvquant.schemes.{module}.PIECE", 10)
    assert growing_sparse.PIECE == 10
    for chunks in ([75], [9, 1, 1, 39, 20, 5]):
        store = filled(spec, keys, values, chunks)
        assert len(list(store.pieces())) == 8
        for a, b in zip(read(store), expected, strict=True):
            assert torch.equal(a, b)


def test_arrays_are_standard_and_grow_by_concatenation() -> None:
    keys, values = data(40)
    spec = KvquantRefScheme(kind="kvquant-ref", bits=4, outliers=0.05, sinks=0)
    store = filled(spec, keys, values, [39])
    before = store.key_outliers.channels
    store.append(keys[:, 39:], keys[:, 39:], values[:, 39:])
    table = narrow_quantizers(4, 2, 64)[0]
    rows = keys.float().transpose(0, 1).flatten(1)
    normalized = (rows - table.key_zero.view(-1)) / table.key_scale.view(-1)
    sparse = store.key_outliers
    assert sparse.channels.data_ptr() != before.data_ptr()
    csr = torch.sparse_csr_tensor(
        sparse.pointers.long(),
        sparse.channels.long(),
        sparse.values,
        size=rows.shape,
        check_invariants=True,
    )
    assert torch.equal(csr.to_dense() != 0, normalized.abs() > 1.0)
    per_token = store.value_outliers.pointers.diff()
    assert per_token.unique().tolist() == [6]  # 2.5 % of 128 channels at each end
    assert sparse.total == int(sparse.pointers[-1]) == sparse.channels.numel()


def test_rows_of_equal_numbers() -> None:
    keys, values = data(8)
    values[:, 2] = 1.5
    values[:, 3] = 0.0
    store = filled(KvquantRefScheme(kind="kvquant-ref", bits=2, sinks=0), keys, values, [8])
    found = read(store)[1]
    assert torch.equal(found[:, 2:4], values[:, 2:4].float())


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["gqa", "mha"])
def test_padding_is_not_stored(kv_heads: int) -> None:
    spec = KvquantRefScheme(kind="kvquant-ref", bits=4)
    qm = quantized(tiny_model(kv_heads=kv_heads), spec)
    rows, ids, mask = ragged([40, 12], "left")
    _, cache = feed(qm, ids, mask, [40])
    assert [s.length for s in cache.layers[1].stores] == [40, 12]
    _, alone = feed(qm, rows[1][None], None, [12])
    for a, b in zip(read(cache.layers[0].stores[1]), read(alone.layers[0].stores[0]), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    assert cache.quantize_seconds > 0


def test_errors_name_the_fix(tmp_path: Path) -> None:
    spec = KvquantRefScheme(kind="kvquant-ref", bits=4)
    with pytest.raises(UserError, match="'kvquant-ref' needs a quantizer file"):
        build_caches(spec, ModelShape(2, 2, 16), None)
    qm = quantized(tiny_model(), spec)
    with pytest.raises(ValueError, match="protocol"):
        qm.new_cache("C")  # type: ignore[arg-type]
    cache = qm.new_cache()
    with pytest.raises(RuntimeError, match="load_quantized_model"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    with pytest.raises(ValueError, match="attention_mask: shape"):
        cache.begin_forward(2, 5, torch.ones(2, 4), torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-1)
    _, ids, mask = ragged([9, 4], "left")
    _, cache = feed(qm, ids, mask, [9])
    with pytest.raises(ValueError, match="every call of a padded batch"):
        cache.begin_forward(2, 1, None, torch.device("cpu"))
    for positions in (torch.arange(5)[None], torch.zeros(3, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="position_ids: shape"):
            cache.begin_forward(2, 1, torch.ones(2, 10), torch.device("cpu"), positions)


def test_a_chosen_sequence_without_padding_needs_no_mask() -> None:
    """A mask was asked for as long as any sequence had ever been padded."""
    qm = quantized(tiny_model(), KvquantRefScheme(kind="kvquant-ref", bits=4))
    rows, tokens, mask = ragged([70, 41], "left")
    _, cache = feed(qm, tokens, mask, [70])
    _, alone = feed(qm, rows[0][None], None, [70])
    cache.batch_select_indices(torch.tensor([0]))
    more = ids(1, 9, 5)
    found, want = (step(qm.model, held, more) for held in (cache, alone))
    torch.testing.assert_close(found, want, atol=2e-3, rtol=2e-3)
