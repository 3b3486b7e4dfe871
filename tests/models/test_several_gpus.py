"""Models whose layers are spread over two GPUs, against the same models on one.

`pytest -n 0 -m gpu tests/models/test_several_gpus.py` on a machine with two GPUs or more.
`tests/cache/test_device_copies.py` runs the same uses over pretended GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.calibration.collect import calibrate
from kvquant.evaluation.likelihood import score
from kvquant.evaluation.perplexity import measure_windows
from kvquant.kernels.backends import select
from kvquant.models.generation import greedy
from kvquant.models.graph_decoding import GraphedDecoder
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.models.static_decoding import StaticDecoder
from kvquant.study.calibration import CalibrationSpec
from tests.support.cache_uses import sharpen
from tests.support.caches import GREEDY, ids
from tests.support.hybrids import tiny_hybrid
from tests.support.models import save_tiny, tiny_model
from tests.support.several_devices import (
    IMPOSSIBLE,
    SCHEMES,
    USES,
    OnItsDevice,
    device_map,
    on_gpus,
    on_one_and_two,
    spread,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

# The same kernels on two GPUs of one kind; another kind may split its sums otherwise.
CLOSE: dict[str, Any] = {"atol": 2e-3, "rtol": 2e-3}
LOOSE: dict[str, Any] = {"atol": 2e-2, "rtol": 2e-2}
OURS = ("nuq", "allocated", "allocated-unrotated")
KERNELS = ("auto", "triton", "pytorch")


def half_model(**options: Any) -> Any:
    """A tiny model of four layers whose shape the kernels take, in fp16."""
    model = tiny_model(head_dim=64, num_hidden_layers=4, **options)
    sharpen(model)
    return model.half()


def held_on(cache: Any) -> list[int | None]:
    """The GPU of what each layer of a cache of packed blocks holds."""
    return [layer.store.tail[0].device.index for layer in cache.layers]


def compare(
    both: list[QuantizedModel], use: str, protocol: Any = "A", close: dict[str, Any] = CLOSE
) -> Any:
    """Runs a use on one GPU and on two; returns the cache that is on two."""
    one, two = both
    plain = one.new_cache(protocol)
    plain.graphs = False  # a graph's steps differ by the order of sums
    expected = USES[use](OnItsDevice(one), plain)
    cache = two.new_cache(protocol)
    found = USES[use](OnItsDevice(two), cache)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, **close)
    return cache


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("scheme", OURS)
def test_our_schemes_by_each_backend(
    scheme: str, use: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", kernels)
    cache = compare(on_one_and_two(half_model(), scheme, tmp_path), use)
    assert held_on(cache) == [0, 0, 1, 1]
    cache.settle()
    if kernels == "auto" and scheme != "allocated" and use == "chunks and steps":
        for store, gpu in ((cache.layers[0].store, 0), (cache.layers[2].store, 1)):
            shape, device = cache._planner._stored_shape(store), torch.device("cuda", gpu)
            assert select("decode", shape, device).backend == "cuda"
            assert device in cache._planner._kernels._tables
    if kernels != "pytorch" and use != "jumping positions":
        packed = [layer.store.packed_by_kernels for layer in cache.layers]
        assert all(packed) or (scheme != "nuq" and kernels == "triton")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in OURS])
def test_other_schemes(scheme: str, use: str, tmp_path: Path) -> None:
    if (scheme, use) in IMPOSSIBLE:
        pytest.skip("the cache cannot do that on any number of devices")
    compare(on_one_and_two(half_model(), scheme, tmp_path), use)


@pytest.mark.parametrize("use", ["chunks and steps", "left padding"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("scheme", ["nuq", "allocated", "kivi"])
def test_protocol_b(
    scheme: str, kernels: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", kernels)
    compare(on_one_and_two(half_model(), scheme, tmp_path), use, "B")


@pytest.mark.parametrize("placement", ["alternating", "apart"])
@pytest.mark.parametrize("use", ["chunks and steps", "left padding", "jumping positions", "crop"])
def test_any_placement(use: str, placement: str, tmp_path: Path) -> None:
    cache = compare(on_one_and_two(half_model(), "nuq", tmp_path, placement), use)
    expected = {"alternating": [0, 1, 0, 1], "apart": [1, 1, 1, 1]}[placement]
    assert held_on(cache) == expected


@pytest.mark.parametrize("use", [use for use in USES if use not in ("crop", "jumping positions")])
@pytest.mark.filterwarnings("ignore:model. all layers have a sliding window")
@pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral", "ministral"])
def test_windows(name: str, use: str, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    options: dict[str, Any] = {} if name == "mistral" else {"layer_types": types}
    model = tiny_hybrid(name, num_hidden_layers=4, **options)
    compare(on_one_and_two(model, "nuq", tmp_path), use)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                   "max_position_embeddings": 64}),
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}),
        ("qwen3", {}),
        ("cohere", {}),
        ("granite", {"attention_multiplier": 0.1, "logits_scaling": 3.0}),
        ("ministral3", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*columns, but the model is made for")
def test_families(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    compare(
        on_one_and_two(half_model(family=family, **options), "nuq", tmp_path), "chunks and steps"
    )


@pytest.mark.parametrize("scheme", ["nuq", "allocated", "fp16", "fp16-static", "kvquant-ref"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for qm in on_one_and_two(half_model(), scheme, tmp_path):
        cache = qm.new_cache()
        cache.graphs = False  # as above
        out = qm.model.generate(
            ids(2, 70).to(qm.device), past_key_values=cache, max_new_tokens=40,
            **{**GREEDY, **options},
        )  # fmt: skip
        found.append(out.cpu())
    assert (found[0] == found[1]).float().mean() > 0.9  # ties of an untrained model may fall


@pytest.mark.parametrize("scheme", ["nuq", "allocated", "fp16", "fp16-static", "kivi"])
def test_greedy_batches_drop_ended_answers(scheme: str, tmp_path: Path) -> None:
    model = half_model(vocab_size=512)
    prompts = [ids(1, n, n)[0].tolist() for n in (70, 33, 55, 64)]
    found = [
        greedy(
            qm, prompts, 80, batch_size=4, eos_ids=(), graph=False,
            stop=lambda answer: len(answer) >= 12 + answer[0] % 60,
        )
        for qm in on_one_and_two(model, scheme, tmp_path)
    ]  # fmt: skip
    pairs = zip(found[0].tokens, found[1].tokens, strict=True)
    same = [a == b for one, two in pairs for a, b in zip(one, two, strict=True)]
    assert sum(same) / len(same) > 0.9
    assert found[0].row_bytes == found[1].row_bytes


def test_no_graph_holds_the_work_of_two_gpus(tmp_path: Path) -> None:
    _, two = on_one_and_two(half_model(), "nuq", tmp_path)
    cache = two.new_cache()
    with torch.inference_mode():
        two.model(ids(2, 70).to(two.device), past_key_values=cache)
    with pytest.raises(ValueError, match="a graph holds the work of one GPU; call the model"):
        GraphedDecoder(two.model, cache)  # type: ignore[arg-type]
    assert "forward" in two.model.__dict__  # accelerate's, so that steps are never captured
    _, two = on_one_and_two(half_model(), "fp16-static", tmp_path)
    static: Any = two.new_cache()
    with torch.inference_mode():
        two.model(ids(2, 70).to(two.device), past_key_values=static)
    with pytest.raises(ValueError, match="a graph holds the work of one GPU; call the model"):
        StaticDecoder(two.model, static, torch.ones(2, 70), 8)


@pytest.mark.parametrize("where", ["auto", "balanced", "sequential", {"": 1}])
def test_files_by_a_device_map(where: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    plain = load_quantized_model(folder, SCHEMES["kivi"], device="cuda:0", dtype=torch.float16)
    placed = load_quantized_model(folder, SCHEMES["kivi"], device_map=where, dtype=torch.float16)
    compare([plain, placed], "chunks and steps", close=LOOSE)


def test_one_gpu_that_is_not_the_current_one(tmp_path: Path) -> None:
    """All on GPU 1, while GPU 0 is the current one: graphs, kernels and late checks are there."""
    model = half_model()
    assert torch.cuda.current_device() == 0
    here, there = on_gpus(model, "nuq", tmp_path, {"": 0}, {"": 1})
    prompts = [ids(1, 70)[0].tolist(), ids(1, 50, 1)[0].tolist()]
    found = [greedy(qm, prompts, 100, batch_size=2, eos_ids=()).tokens for qm in (here, there)]
    same = [a == b for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) / len(same) > 0.9


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_losses(protocol: Any, tmp_path: Path) -> None:
    both = on_one_and_two(half_model(), "nuq", tmp_path)
    found = [measure_windows(qm, ids(2, 90).to(qm.device), protocol, 40, kl=True) for qm in both]
    torch.testing.assert_close(found[0].nll, found[1].nll, **CLOSE)
    assert found[0].kl is not None and found[1].kl is not None
    torch.testing.assert_close(found[0].kl, found[1].kl, **CLOSE)
    scores = [score(qm, protocol, ids(1, 80)[0].tolist(), 20) for qm in both]
    assert scores[0] == pytest.approx(scores[1], rel=2e-3)


def test_calibration() -> None:
    model = tiny_model(num_hidden_layers=4)
    windows = [ids(1, 60, seed)[0].tolist() for seed in range(3)]
    spec = CalibrationSpec(windows=3, window=60)
    found = [
        calibrate(spread(model, where), windows, spec, 16, roped_keys=True)
        for where in ({"": 0}, device_map("halves", model))
    ]
    for one, two in zip(*found, strict=True):
        for name, expected in vars(one).items():
            if isinstance(expected, torch.Tensor) and expected.is_floating_point():
                torch.testing.assert_close(
                    getattr(two, name).cpu(), expected.cpu(), atol=1e-3, rtol=1e-2
                )
