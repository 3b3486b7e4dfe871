"""Layers on several devices, pretended on a CPU: what one device gives, and nothing is mixed.

Each operation on tensors of two devices is an error there, as it is on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.cache.device_copies import DeviceCopies
from kvquant.cache.forward_plan import ForwardPlan, KernelStep
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.outlier_watch import OutlierWatch
from kvquant.errors import OutlierOverflow, UserError
from kvquant.models.loading import load_quantized_model
from kvquant.models.placement import layer_devices
from tests.kernels.emulate import emulate, emulate_decode
from tests.support import pretend_gpus as pretended
from tests.support.caches import CLOSE, EXACT, ids, quantized, step
from tests.support.hybrids import tiny_hybrid
from tests.support.models import tiny_model
from tests.support.pretend_gpus import pretend_gpus
from tests.support.several_devices import (
    IMPOSSIBLE,
    SCHEMES,
    USES,
    OnItsDevice,
    device_map,
    on_one_and_two,
    saved_quantizer,
    spread,
)

FOUR = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# One of each way of coding: under protocol B the others read by the same code.
OF_PROTOCOL_B = ("nuq", "allocated", "kivi", "kvquant-ref")
# The others differ in masks and in which sequences go on, which protocol A tests for each scheme.
USES_OF_PROTOCOL_B = ("chunks and steps", "left padding", "holes", "jumping positions", "crop")
ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture()
def gpus() -> Iterator[None]:
    """GPUs without kernels."""
    with pretend_gpus():
        yield


def check(both: list[Any], use: str, protocol: Any = "A") -> Any:
    """Runs a use on one GPU and on two, which compute the same bit for bit; the second cache."""
    one, two = both
    plain = one.new_cache(protocol)
    plain.graphs = False  # on one GPU steps would be captured
    expected = USES[use](OnItsDevice(one), plain)
    cache = two.new_cache(protocol)
    found = USES[use](OnItsDevice(two), cache)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return cache


def held_on(cache: KVQuantCache) -> list[int]:
    """The GPU of what each layer of a filled cache holds."""
    rings = [getattr(layer, "ring", None) for layer in cache.layers]
    held = [ring or layer.store.tail for ring, layer in zip(rings, cache.layers, strict=True)]
    return [pair[0].device.index for pair in held]


def test_pretended_devices_are_not_mixed(gpus: None) -> None:
    zero, one = (torch.arange(3, device=device) for device in (ZERO, ONE))
    assert (zero.device, one.device) == (ZERO, ONE)
    for other in (one, torch.arange(3)):
        with pytest.raises(RuntimeError, match="tensors on cuda:0"):
            zero + other
        with pytest.raises(RuntimeError, match="tensors on"):
            torch.cat((zero, other))
    assert (zero + one.to(ZERO)).tolist() == [0, 2, 4]
    zero[1:].copy_(one[:2])
    assert zero.tolist() == [0, 0, 1]
    assert (zero.cpu().device.type, bool(one[0] == 0)) == ("cpu", True)


def test_a_tensor_is_copied_once(gpus: None) -> None:
    copies, x = DeviceCopies(ONE), torch.arange(3, device=ZERO)
    copy = copies.of(x)
    assert copy.device == ONE and copies.of(x) is copy and copies.of_any(x) is copy
    assert copies.of_any(None) is copies.of_table(None) is None
    table = copies.of_table((x, x))
    assert table is not None and table[0] is table[1] is copy
    spans = copies.of_spans([slice(0, 2), x])
    assert spans[0] == slice(0, 2) and spans[1] is copy


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("scheme", "use", "protocol"),
    [
        *((scheme, use, "A") for scheme in SCHEMES for use in USES),
        *((scheme, use, "B") for scheme in OF_PROTOCOL_B for use in USES_OF_PROTOCOL_B),
    ],
)
def test_every_use_gives_what_one_device_gives(
    scheme: str, use: str, protocol: Any, tmp_path: Path, gpus: None
) -> None:
    if (scheme, use) in IMPOSSIBLE:
        pytest.skip("the cache cannot do that on any number of devices")
    model = tiny_model(num_hidden_layers=3)  # of which the second GPU has two
    check(on_one_and_two(model, scheme, tmp_path), use, protocol)


@pytest.mark.parametrize("use", ["a reordered batch", "a chosen batch"])
def test_sequences_that_share_blocks_keep_their_outliers(
    use: str, tmp_path: Path, gpus: None
) -> None:
    """Readers on a GPU count the outliers by slots, which a block takes once."""
    model = tiny_model()
    expected = USES[use](model, quantized(model, EXACT).new_cache())
    one = load_quantized_model(
        spread(model, {"": 0}), EXACT, quantizer=saved_quantizer(tmp_path, model, EXACT)
    )
    found = USES[use](OnItsDevice(one), one.new_cache())
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("use", ["chunks and steps", "holes", "jumping positions", "crop"])
@pytest.mark.parametrize(
    ("placement", "expected"), [("alternating", [0, 1, 0, 1]), ("apart", [1, 1, 1, 1])]
)
def test_any_placement(
    placement: str, expected: list[int], use: str, tmp_path: Path, gpus: None
) -> None:
    both = on_one_and_two(tiny_model(num_hidden_layers=4), "nuq", tmp_path, placement)
    cache = check(both, use)
    assert held_on(cache) == expected
    copied = cache.copy()
    assert held_on(copied) == expected
    if use == "jumping positions":
        assert {d.index for d in cache._rope.kept._tables} >= set(expected)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("name", "protocol", "use"),
    [
        *(
            ("gemma3", "A", use)
            for use in USES
            if use not in ("crop", "jumping positions", "copies")
        ),
        *(("gemma3", "B", use) for use in ("chunks and steps", "left padding", "a chosen batch")),
        *(("gemma2", "A", use) for use in ("chunks and steps", "left padding")),  # has caps
    ],
)
def test_windows(name: str, protocol: Any, use: str, tmp_path: Path, gpus: None) -> None:
    model = tiny_hybrid(name, num_hidden_layers=4, layer_types=FOUR)
    cache = check(on_one_and_two(model, "nuq", tmp_path), use, protocol)
    assert held_on(cache) == [0, 0, 1, 1]


@pytest.mark.filterwarnings("ignore:.*columns, but the model is made for")
def test_a_rotation_that_changes_with_the_length(tmp_path: Path, gpus: None) -> None:
    model = tiny_model(num_hidden_layers=4, rope_parameters=DYNAMIC, max_position_embeddings=64)
    cache = check(on_one_and_two(model, "nuq", tmp_path), "chunks and steps")
    assert set(cache._rope.kept._tables) == {ZERO, ONE}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("scheme", ["nuq", "allocated-unrotated"])
def test_decode_steps_by_kernels(scheme: str, tmp_path: Path) -> None:
    """Each device has tables of its own, which count the same tokens."""
    # What is set within the pretended GPUs is undone before they are.
    with pretend_gpus("auto"), pytest.MonkeyPatch.context() as monkeypatch:
        emulate(monkeypatch)
        emulate_decode(monkeypatch)
        model = tiny_model(num_hidden_layers=4, head_dim=64)
        both = on_one_and_two(model, scheme, tmp_path, "alternating")
        plans: list[ForwardPlan] = []
        meet = KVQuantCache.meet

        def kept(cache: KVQuantCache, *args: Any) -> ForwardPlan:
            plans.append(meet(cache, *args))
            return plans[-1]

        monkeypatch.setattr(KVQuantCache, "meet", kept)
        for use in ("chunks and steps", "left padding", "crop", "a chosen batch"):
            plans.clear()
            cache = check(both, use)
            cache.settle()
            last = plans[-2:]
            assert [plan.device for plan in last] == [ZERO, ONE]
            if use == "chunks and steps":
                for plan in last:
                    assert isinstance(plan.path, KernelStep)
                    assert plan.path.step.table.device == plan.path.places.device == plan.device
                    assert plan.status is not None and plan.status.device == plan.device


def test_copies_do_not_grow_with_the_layers(
    tmp_path: Path, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the layers of a device share is copied there once per call."""
    counts = []
    for layers in (4, 8):
        _, qm = on_one_and_two(tiny_model(num_hidden_layers=layers), "nuq", tmp_path)
        cache = qm.new_cache()
        step(qm.model, cache, ids(2, 50).to(ZERO))
        moved: list[str] = []
        attend, run = cache.attend, pretended.run

        def counted(func: Any, args: Any, kwargs: Any, run: Any = run, to: Any = moved) -> Any:
            out = run(func, args, kwargs)
            given = [x.device for x in args if isinstance(x, torch.Tensor)]
            if isinstance(out, torch.Tensor) and any(d != out.device for d in given):
                to.append(str(func))
            return out

        def within(*args: Any, attend: Any = attend, counted: Any = counted) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(pretended, "run", counted)
                return attend(*args)

        monkeypatch.setattr(cache, "attend", within)
        for size in (20, 1):
            step(qm.model, cache, ids(2, size, 1).to(ZERO))
        counts.append(len(moved))
    assert counts[0] == counts[1] > 0


def test_one_device_copies_nothing(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    qm = load_quantized_model(spread(tiny_model(), {"": 0}), SCHEMES["kivi"])
    cache = qm.new_cache()
    monkeypatch.setattr(ForwardPlan, "on", None)
    for size in (50, 20, 1):
        step(qm.model, cache, ids(2, size).to(ZERO))


def test_losses_of_every_device_are_told(gpus: None) -> None:
    for lossy in (ZERO, ONE):
        watch = OutlierWatch()
        for device in (ZERO, ONE):
            status = watch.status(device)
            assert status is not None and status.device == device
        lost = watch.status(lossy)
        assert lost is not None
        lost[0] += 5
        watch.note_packing()
        watch.check()
        with pytest.raises(OutlierOverflow, match="5 found no room"):
            watch.check()
        with pytest.raises(OutlierOverflow, match="5 found no room"):
            watch.fork().settle()


def test_each_layer_is_on_one_gpu(gpus: None) -> None:
    model = tiny_model()
    places = device_map("halves", model)
    assert layer_devices(spread(model, places)) == [ZERO, ONE]
    split = {k: v for k, v in places.items() if k != "model.layers.1"}
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    split |= {f"model.layers.1.{part}": int(part == "mlp") for part in parts}
    torn = spread(model, split)
    with pytest.raises(UserError, match=r"^device_map: layer 1 is on cuda:0, cuda:1; put each"):
        load_quantized_model(torn, SCHEMES["kivi"])


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_offloaded_weights_are_refused(where: str, gpus: None) -> None:
    model = spread(tiny_model(), {"": 0})
    model.model.layers[1].to(where)
    with pytest.raises(UserError, match=rf"^device_map: the model is on cuda:0, {where}|{where}, "):
        load_quantized_model(model, SCHEMES["kivi"])
