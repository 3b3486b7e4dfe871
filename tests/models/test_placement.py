"""Layers over several GPUs, evenly by bytes: none of another order, none on two."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.models.loading import load_base_model, load_quantized_model, resolve_devices
from kvquant.models.placement import even_map, even_shares, layer_devices, spread
from tests.support.caches import ids, step
from tests.support.hybrids import tiny_hybrid
from tests.support.models import save_tiny, tiny_model
from tests.support.nvml import torch_sees
from tests.support.pretend_gpus import pretend_gpus
from tests.support.several_devices import SCHEMES

THREE = [torch.device("cuda", index) for index in range(3)]


def largest(sizes: list[int], shares: list[int], parts: int, first: int, last: int) -> int:
    """The bytes of the largest part."""
    loads = [0] * parts
    for size, part in zip(sizes, shares, strict=True):
        loads[part] += size
    loads[0] += first
    loads[-1] += last
    return max(loads)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_no_other_cut_has_a_smaller_largest_part(
    sizes: list[int], parts: int, first: int, last: int
) -> None:
    parts = min(parts, len(sizes))
    found = even_shares(sizes, parts, first, last)
    every = [
        list(shares)
        for shares in itertools.product(range(parts), repeat=len(sizes))
        if list(shares) == sorted(shares) and len(set(shares)) == parts
    ]
    assert found in every
    best = min(largest(sizes, shares, parts, first, last) for shares in every)
    assert largest(sizes, found, parts, first, last) == best


def test_a_large_vocabulary_leaves_its_gpus_fewer_layers() -> None:
    plain = even_shares([10] * 12, 3)
    assert plain == [0] * 4 + [1] * 4 + [2] * 4
    found = even_shares([10] * 12, 3, first=30, last=30)
    assert [found.count(part) for part in range(3)] == [3, 6, 3]


def test_parts_of_a_model() -> None:
    model = tiny_model(num_hidden_layers=6)
    places = even_map(model, THREE)
    assert next(iter(places)) == "model.embed_tokens"  # inputs go where the first part is
    assert places["model.embed_tokens"] == places["model.rotary_emb"] == THREE[0]
    assert places["model.norm"] == places["lm_head"] == THREE[2]
    layers = [places[f"model.layers.{i}"] for i in range(6)]
    assert layers == sorted(layers, key=str) and set(layers) == set(THREE)


def test_a_head_that_is_the_embedding_stays_with_it() -> None:
    with torch.device("meta"):
        model = tiny_model(num_hidden_layers=3, tie_word_embeddings=True)
    places = even_map(model, THREE)
    assert places["lm_head"] == places["model.embed_tokens"] == THREE[0]
    assert places["model.norm"] == THREE[2]


def test_more_gpus_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"^gpus: 3 GPUs are asked for, but the model has 2 layers"):
        even_map(tiny_model(), THREE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_logits_are_those_of_one_gpu(family: str, tied: bool) -> None:
    with pretend_gpus():
        found = []
        for count in (1, 3):
            options: dict[str, Any] = {"num_hidden_layers": 4, "tie_word_embeddings": tied}
            if family == "gemma3":
                kinds = ["sliding_attention", "full_attention"] * 2
                model = tiny_hybrid("gemma3", layer_types=kinds, **options)
            else:
                model = tiny_model(family, **options)
            model = spread(model, THREE[:count])
            assert set(layer_devices(model)) == set(THREE[:count])
            qm = load_quantized_model(model, SCHEMES["kivi"])
            cache = qm.new_cache()
            cache.graphs = False
            logits = [step(qm.model, cache, ids(2, n, n).to(THREE[0])) for n in (50, 1, 1)]
            found.append(torch.cat(logits, 1).cpu())
        torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


def test_files_by_a_list_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model")
    with pretend_gpus():
        torch_sees(monkeypatch, ["aa", "bb", "cc"], current=0)
        qm = load_quantized_model(folder, SCHEMES["kivi"], device_map=["cuda:2", "cuda:0"])
        assert layer_devices(qm.model) == [THREE[2], THREE[0]]
        assert (qm.device, qm.dtype) == (THREE[2], torch.float16)
        one, _ = load_base_model(folder, device_map=[torch.device("cuda:1")])
        assert set(layer_devices(one)) == {THREE[1]}
    plain, _ = load_base_model(folder, device_map=["cpu"])
    assert plain.dtype is torch.float32


@pytest.mark.parametrize(
    "listed", [[], ["cuda:0", "cuda:0"], ["cuda:0", "cuda"], ["cpu", "cuda:1"], ["cpu", "cpu"]]
)
def test_a_list_names_different_gpus(listed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch_sees(monkeypatch, ["aa", "bb"], current=0)
    with pytest.raises(UserError, match=r"^device_map: .*: a list names one device, or different"):
        resolve_devices(listed)
    with pytest.raises(UserError, match="numbered from 0"):
        resolve_devices(["cuda:0", "cuda:2"])
