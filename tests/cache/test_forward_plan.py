"""The plan of a call: made by `begin_forward`, completed by the first layer, read by all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from kvquant.cache.attending import AttendingCache
from kvquant.cache.forward_plan import (
    FirstCall,
    ForwardPlan,
    KernelStep,
    Order,
    PackedPast,
    PastPieces,
)
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.kernels import backends
from kvquant.models.graph_decoding import GraphedDecoder
from kvquant.models.loading import QuantizedModel
from kvquant.study.schemes import NuqScheme
from tests.kernels.emulate import emulate, emulate_decode
from tests.support.caches import LOSSY, ids, quantized, step
from tests.support.models import tiny_model
from tests.support.quantizers import constant_quantizer

CPU = torch.device("cpu")


def plans_of(cache: KVQuantCache, monkeypatch: pytest.MonkeyPatch) -> list[ForwardPlan]:
    """The plans that the layers of a cache get from now on, one per call."""
    found: list[ForwardPlan] = []
    meet = cache.meet

    def kept(*args: Any) -> ForwardPlan:
        found.append(meet(*args))
        return found[-1]

    monkeypatch.setattr(cache, "meet", kept)
    return found


def test_a_plan_is_frozen_and_layers_hold_no_cache() -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    plan = cache.begin_forward(2, 5, None, CPU)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.order = Order.READ_FIRST  # type: ignore[misc]
    step(qm.model, cache, ids(2, 50))
    for layer in cache.layers:
        assert not any(isinstance(value, AttendingCache) for value in vars(layer).values())


@pytest.mark.parametrize(
    ("protocol", "paths", "orders"),
    [
        ("A", [FirstCall, PastPieces, PastPieces], ["APPEND_FIRST", "READ_FIRST", "READ_FIRST"]),
        ("B", [PastPieces, PastPieces, PastPieces], ["APPEND_FIRST"] * 3),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_paths_and_orders_in_pytorch(
    protocol: Any, paths: Any, orders: Any, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache(protocol)
    plans = plans_of(cache, monkeypatch)
    mask = torch.ones(2, 58, dtype=torch.long)
    mask[1, :7] = 0 if padded else 1
    for first, stop in ((0, 50), (50, 57), (57, 58)):
        step(qm.model, cache, ids(2, stop - first), mask[:, :stop])
    assert [type(plan.path) for plan in plans] == paths
    assert [plan.order.name for plan in plans] == orders
    assert all(plan.simulated == (protocol == "B") for plan in plans)
    assert all(plan.view is getattr(plan.append, "after" if protocol == "B" else "before")
               for plan in plans)  # fmt: skip
    assert (plans[0].token_positions is None) == (not padded)
    whole = [isinstance(p.path, PastPieces) and p.path.whole for p in plans]
    assert whole == [protocol == "B" and not padded, False, False]


def test_packed_past_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", "triton")
    interpreted = backends.DeviceFacts("cpu", interpreter=True)  # also on a machine with a GPU
    monkeypatch.setattr(backends, "device_facts", lambda device: interpreted)
    cache = small_model().new_cache()
    plan = cache.begin_forward(1, 3, None, CPU)
    keys = torch.zeros(1, 2, 3, 64)
    rope = (torch.ones(1, 3, 64), torch.zeros(1, 3, 64))
    assert isinstance(cache.meet(plan, cache.layers[0], keys, keys, rope).path, FirstCall)
    cache = small_model().new_cache("B")
    plan = cache.begin_forward(1, 3, None, CPU)
    assert isinstance(cache.meet(plan, cache.layers[0], keys, keys, rope).path, PackedPast)


def small_model(family: str = "llama") -> QuantizedModel:
    """A model whose shape the kernels take."""
    # Keys of GPT-OSS have large biases here.
    quantizers = [constant_quantizer(2, 64, 3, 3.0 if family == "gpt_oss" else 0.4)] * 2
    spec = NuqScheme(kind="nuq", bits=3, block_size=32)
    options: dict[str, Any] = {}
    if family == "gemma2":
        options = {"attn_logit_softcapping": 0.02, "query_pre_attn_scalar": 4}
    return quantized(tiny_model(family, head_dim=64, **options), spec, quantizers)


class Replayed:
    """Stands for a CUDA graph: a replay is the step's work done again."""

    decoder: GraphedDecoder

    def replay(self) -> None:
        captured = self.decoder._captured
        assert captured is not None
        captured.logits.copy_(self.decoder._work())


class Stream:
    """Stands for a CUDA stream."""

    def wait_stream(self, other: Stream) -> None:
        """Nothing runs beside the host."""


class TestKernelSteps:
    """Decode steps by the CUDA kernels, run on a CPU (`tests/kernels/emulate.py`)."""

    LENGTHS = (93, 60)
    STEPS = 10  # a block becomes full in each sequence

    @pytest.fixture()
    def kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        emulate(monkeypatch)
        emulate_decode(monkeypatch)

    @torch.inference_mode()
    def prefill(self, qm: QuantizedModel) -> tuple[KVQuantCache, torch.Tensor]:
        width = max(self.LENGTHS)
        mask = torch.ones(2, width, dtype=torch.long)
        mask[1, : width - self.LENGTHS[1]] = 0
        cache = qm.new_cache()
        where = (mask.cumsum(1) - 1).clamp(min=0)
        qm.model(ids(2, width), attention_mask=mask, position_ids=where, past_key_values=cache)
        assert isinstance(cache, KVQuantCache)
        return cache, mask

    @torch.inference_mode()
    def eager(self, qm: QuantizedModel) -> tuple[KVQuantCache, torch.Tensor]:
        cache, mask = self.prefill(qm)
        tokens, found = ids(2, self.STEPS, 3), []
        for i in range(self.STEPS):
            mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
            where = torch.tensor(self.LENGTHS)[:, None] + i
            out = qm.model(
                tokens[:, i : i + 1], attention_mask=mask, position_ids=where, past_key_values=cache
            )
            found.append(out.logits[:, -1])
        return cache, torch.stack(found)

    @contextmanager
    def on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "Stream", Stream)
            patch.setattr(torch.cuda, "current_stream", Stream)
            patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
            patch.setattr(torch.cuda, "CUDAGraph", Replayed)
            patch.setattr(torch.cuda, "graph", lambda *args, **options: nullcontext())
            patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16))
            yield

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
    def test_eager_graphed_and_pytorch_steps_agree(
        self, family: str, kernels: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where scores are capped, and where attention has sinks."""
        qm = small_model(family)
        with monkeypatch.context() as patch:
            patch.setenv("KVQUANT_KERNELS", "pytorch")
            _, expected = self.eager(qm)
        cache, found = self.eager(qm)
        assert float((found - expected).norm() / expected.norm()) < 0.02
        graphed, _ = self.prefill(qm)
        tokens = ids(2, self.STEPS, 3)
        with self.on_a_cpu(monkeypatch):
            decoder = GraphedDecoder(qm.model, graphed, 4)  # too little room: captured again
            monkeypatch.setattr(Replayed, "decoder", decoder, raising=False)
            got = [decoder.step(tokens[:, i : i + 1]).clone() for i in range(self.STEPS)]
        torch.testing.assert_close(torch.stack(got), found, atol=1e-4, rtol=1e-4)
        assert graphed.lengths == cache.lengths == [n + self.STEPS for n in self.LENGTHS]
        assert graphed.columns == cache.columns
        for mine, theirs in zip(graphed.layers, cache.layers, strict=True):
            for a, b in zip(mine.store.tail, theirs.store.tail, strict=True):
                torch.testing.assert_close(a, b)

    def test_a_step_is_planned_for_the_kernel(
        self, kernels: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        qm = small_model()
        cache, mask = self.prefill(qm)
        plans = plans_of(cache, monkeypatch)
        mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
        where = torch.tensor(self.LENGTHS)[:, None]
        with torch.inference_mode():
            qm.model(ids(2, 1), attention_mask=mask, position_ids=where, past_key_values=cache)
        (plan,) = plans
        assert isinstance(plan.path, KernelStep)
        assert plan.order is Order.WITHIN_STEP
        assert plan.path.places.tolist() == plan.append.before.tails

    def test_a_handed_plan_counts_nothing(self, kernels: None) -> None:
        qm = small_model()
        cache, _ = self.prefill(qm)
        steps = cache.step_tables(CPU)
        assert steps is not None
        steps.reserve(cache.layout, 8)
        steps.write(cache.layout, [len(t) for t in cache.layout.table], cache.layout.tails)
        where = torch.tensor(self.LENGTHS)[:, None]
        before = cache.layout.view()
        plan = cache.graph_plan(steps, where)
        with cache.planned(plan), torch.inference_mode():
            assert cache.begin_forward(2, 1, None, CPU) is plan
            qm.model(ids(2, 1), position_ids=where, past_key_values=cache)
        assert cache.columns == max(self.LENGTHS)
        assert cache.layout.view() == before
        assert not cache.calls.running
