"""Decoding through the CUDA kernel, eager and as a graph, against the PyTorch path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.kernels import backends
from kvquant.models.generation import greedy
from kvquant.models.graph_decoding import GraphedDecoder
from kvquant.models.layer_kinds import layer_kinds
from kvquant.models.loading import QuantizedModel
from kvquant.study.schemes import NuqScheme
from tests.support.caches import SPECS, quantized
from tests.support.models import tiny_model
from tests.support.quantizers import constant_quantizer

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DIM = 64


def half_model(spec: NuqScheme, family: str = "llama") -> QuantizedModel:
    options: dict[str, Any] = {}
    if family in ("gemma2", "gemma3_text", "gpt_oss"):  # the first layer has a window
        types = ["sliding_attention", "full_attention"]
        options = {"sliding_window": 40, "layer_types": types}
    if family == "gemma2":
        options |= {"attn_logit_softcapping": 0.02, "query_pre_attn_scalar": 4}
    model = tiny_model(family, head_dim=DIM, **options).half().cuda()
    if family == "gpt_oss":  # PyTorch's grouped product in fp16 copies to the host
        model.set_experts_implementation("batched_mm")
    layers = len(layer_kinds(model.model).full)
    # The keys of the others are normalized, or have large biases.
    reach = 0.4 if family in ("llama", "gemma2") else 2.6
    return quantized(model, spec, [constant_quantizer(2, DIM, spec.bits, reach)] * layers)


@torch.inference_mode()
def prefill(qm: QuantizedModel, lengths: list[int]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    width = max(lengths)
    ids = torch.randint(0, 97, (len(lengths), width), device="cuda")
    mask = torch.ones_like(ids)
    for row, n in zip(mask, lengths, strict=True):
        row[: width - n] = 0
    cache = qm.new_cache()
    padded = min(lengths) < width
    qm.model(
        input_ids=ids,
        attention_mask=mask if padded else None,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
    )
    return cache, mask, torch.tensor(lengths, device="cuda")[:, None]


@torch.inference_mode()
def eager(qm: QuantizedModel, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    cache, mask, positions = prefill(qm, lengths)
    out = []
    for i in range(tokens.shape[1]):
        mask = torch.cat((mask, mask.new_ones(len(lengths), 1)), 1)
        logits = qm.model(
            input_ids=tokens[:, i : i + 1],
            attention_mask=mask if min(lengths) < max(lengths) else None,
            position_ids=positions + i,
            past_key_values=cache,
        ).logits
        out.append(logits[:, -1].float().clone())
    assert cache.lengths == [n + tokens.shape[1] for n in lengths]
    return torch.stack(out)


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("lengths", [[70, 70], [3, 97, 64]], ids=["equal", "ragged"])
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma2", "gpt_oss"])
    def test_kernel_graph_and_pytorch_agree(
        self, lengths: list[int], family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        qm = half_model(NuqScheme(kind="nuq", bits=3, block_size=32), family)
        tokens = torch.randint(0, 97, (len(lengths), 75), device="cuda")
        monkeypatch.setenv("KVQUANT_KERNELS", "pytorch")
        expected = eager(qm, lengths, tokens)
        monkeypatch.setenv("KVQUANT_KERNELS", "auto")
        found = eager(qm, lengths, tokens)
        cache, _, _ = prefill(qm, lengths)
        assert cache.step_tables(torch.device("cuda")) is not None
        decoder = GraphedDecoder(qm.model, cache, 32)  # too little room: captured again
        graphed = torch.stack(
            [decoder.step(tokens[:, i : i + 1]).float().clone() for i in range(tokens.shape[1])]
        )
        scale = expected.std()
        # fp16 arithmetic against fp32; a rounding that flips a code then shows in later tokens
        assert (found - expected).std() < 0.02 * scale
        assert (found - expected).abs().max() < 0.1 * scale
        assert (graphed - found).abs().max() < 0.01 * scale
        assert cache.lengths == [n + tokens.shape[1] for n in lengths]

    @pytest.mark.parametrize("lengths", [[70, 70], [3, 97, 64]], ids=["equal", "ragged"])
    def test_greedy_answers_are_the_same_with_a_graph(
        self, lengths: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        qm = half_model(NuqScheme(kind="nuq", bits=3, block_size=32))
        torch.manual_seed(5)  # the prompts of `prefill`
        width = max(lengths)
        ids = torch.randint(0, 97, (len(lengths), width), device="cuda")
        rows = [row[width - n :].tolist() for row, n in zip(ids, lengths, strict=True)]
        steps, plain = [0], GraphedDecoder.step

        def counted(self: GraphedDecoder, tokens: torch.Tensor) -> torch.Tensor:
            steps[0] += 1
            return plain(self, tokens)

        monkeypatch.setattr(GraphedDecoder, "step", counted)
        options: dict[str, Any] = {"batch_size": len(rows), "eos_ids": []}
        without = greedy(qm, rows, 100, graph=False, **options)
        assert steps == [0]
        found = greedy(qm, rows, 100, **options)
        assert steps == [99]
        assert found.row_bytes == without.row_bytes
        # Sums are split in another way, so a near tie may fall the other way; each token must be
        # the best, or as good as it, of the steps without a graph on the same answer.
        assert [a[0] for a in found.tokens] == [a[0] for a in without.tokens]
        answers = torch.tensor(found.tokens, device="cuda")
        logits = eager(qm, lengths, answers)[:-1]
        chosen = logits.gather(2, answers[:, 1:].T[..., None])[..., 0]
        assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()

    def test_beams_crop_and_copies_after_kernel_steps(self) -> None:
        qm = half_model(NuqScheme(kind="nuq", bits=4, block_size=32))
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ids = torch.randint(1, 97, (2, 90), device="cuda")
        cache = qm.new_cache()
        first = qm.model.generate(ids, past_key_values=cache, max_new_tokens=40, **settings)
        again = qm.new_cache()
        with torch.inference_mode():
            qm.model(input_ids=ids[:, :60], past_key_values=again)
            fork = again.copy()
            for part in (again, fork):
                qm.model(input_ids=ids[:, 60:-1], past_key_values=part)
        one = qm.model.generate(ids, past_key_values=again, max_new_tokens=40, **settings)
        two = qm.model.generate(ids, past_key_values=fork, max_new_tokens=40, **settings)
        assert torch.equal(one, two)
        assert first.shape == one.shape
        beams = qm.model.generate(
            ids, past_key_values=qm.new_cache(), max_new_tokens=40, num_beams=3, **settings
        )
        assert beams.shape == (2, 130)


def cpu_cache(spec: NuqScheme, tokens: int, reaches: tuple[float, float]) -> tuple[Any, Any]:
    """A model of two layers on a CPU and its cache of some tokens."""
    model = tiny_model(head_dim=DIM)
    tables = [constant_quantizer(2, DIM, spec.bits, reach) for reach in reaches]
    qm = quantized(model, spec, tables)
    cache = qm.new_cache()
    with torch.inference_mode():
        qm.model(input_ids=torch.randint(0, 97, (1, tokens)), past_key_values=cache)
    return qm, cache


def test_a_cache_without_a_kernel_is_refused_with_the_reasons() -> None:
    qm = quantized(tiny_model(), SPECS[0])
    cache = qm.new_cache()
    with pytest.raises(ValueError, match=r"decode kernel .*\. cache: it is empty; call the model"):
        GraphedDecoder(qm.model, cache)
    with torch.inference_mode():
        qm.model(input_ids=torch.randint(0, 97, (1, 40)), past_key_values=cache)
    with pytest.raises(ValueError, match=r"instead\. device: cpu .*\. head_dim: 16 is none of 64"):
        GraphedDecoder(qm.model, cache)


def test_the_reasons_are_those_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is one for the cache, though only its second layer exceeds fp16."""
    spec = NuqScheme(kind="nuq", bits=3, sinks=3, block_size=32)
    where = torch.device("cpu")
    (_, plain), (_, wide) = (cpu_cache(spec, 2, reaches) for reaches in ((1.0, 1.0), (1.0, 7e4)))
    facts = backends.DeviceFacts("cuda", capability=(9, 0))
    monkeypatch.setattr(backends, "device_facts", lambda device: facts)
    monkeypatch.setattr(backends, "_load_problem", lambda shape, index, *, expands: None)
    (short,) = plain.step_refusals(where)
    assert short == (
        "lengths: a sequence of 2 tokens is shorter than the 3 sinks; call the model until it is "
        "longer"
    )
    assert plain.step_tables(where) is not None
    assert [reason.split(":")[0] for reason in wide.step_refusals(where)] == [
        "lengths", "calibration",
    ]  # fmt: skip
    assert wide.step_tables(where) is None
