"""Two GPUs, with some of the kv heads each: kernels pack and attend per process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.errors import OutlierOverflow
from kvquant.fetch.file_hashes import FileHashes
from kvquant.formats.head_share import HeadShare
from kvquant.models.generation import greedy
from kvquant.models.loading import load_quantized_model
from kvquant.study.schemes import (
    AllocatedScheme,
    NuqScheme,
)
from tests.support.caches import ids, step
from tests.support.head_codes import HEADS, KV_HEADS, kernel_codes
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.processes import in_processes
from tests.support.quantizers import (
    narrow_quantizers,
    random_allocated,
    random_quantizer,
    relative_error,
    save_made_quantizer,
)
from tests.support.shared_models import FP8, PROMPTS


def on_gpus(folder: Path, tp_plan: str | None) -> dict[str, Any]:
    """What caches give on GPUs, where kernels pack and attend."""
    found: dict[str, Any] = {}
    for path in ("wide-lossy", "wide-allocated"):
        quantizer = folder / f"quantizers/{path}.json"
        qm = load_quantized_model(folder / "wide", quantizer=quantizer, tp_plan=tp_plan)
        cache = qm.new_cache()
        tokens = ids(2, 150).to(qm.device)
        parts = tokens.split([130, 12, *[1] * 8], 1)
        logits = torch.cat([step(qm.model, cache, part) for part in parts], 1)
        assert all(layer.store.packed_by_kernels for layer in cache.packed)
        cache.settle()
        found[f"{path}, refused"] = cache.step_refusals(qm.device)
        answers = greedy(qm, PROMPTS, 80, batch_size=3, eos_ids=[])  # long enough for a graph
        found[path] = (logits.float().cpu(), answers.tokens, qm.device.index)
    return found


def overflowing(folder: Path) -> dict[str, Any]:
    """What happens where the keys of one process's heads alone are unlike the calibration's."""
    quantizer = folder / "quantizers/wide-crowded.json"
    qm = load_quantized_model(folder / "wide", quantizer=quantizer, tp_plan="auto")
    cache = qm.new_cache()
    try:
        for part in ids(4, 400).to(qm.device).split([390, *[1] * 10], 1):
            step(qm.model, cache, part)
        cache.settle()
        told = ""
    except OutlierOverflow as error:
        told = str(error)
    answers = greedy(qm, [ids(1, 400)[0].tolist()], 8, batch_size=1, eos_ids=[])
    return {"told": told, "answers": answers.tokens}


def all_on_gpus(folder: Path) -> dict[str, Any]:
    """Everything that one of two processes with a GPU each finds."""
    found = on_gpus(folder, "auto")
    qm = load_quantized_model(folder / "wide", FP8, tp_plan="auto")
    found["codes"] = kernel_codes(qm.share)
    found["overflow"] = overflowing(folder)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    """Kernels pack and attend per process; their codes are those of one GPU bit for bit."""
    model = tiny_model(
        "llama", HEADS, KV_HEADS, vocab_size=512, head_dim=64, hidden_size=256,
        initializer_range=0.3, max_position_embeddings=1024,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    weights, _ = FileHashes(tmp_path / "wide", "model").of_all(["model.safetensors"])
    lossy = NuqScheme(kind="nuq", bits=3)
    crowded = [
        replace(t, key_scale=t.key_scale * torch.tensor([40.0, 40.0, 40.0, 0.0])[:, None])
        for t in narrow_quantizers(3, KV_HEADS, 64)
    ]
    tables = {
        "lossy": (lossy, [random_quantizer(KV_HEADS, 64, 3, scale=(10, 20)) for _ in range(2)]),
        "allocated": (
            AllocatedScheme(kind="allocated"),
            [random_allocated(KV_HEADS, 64, scale=(10, 20), seed=layer) for layer in range(2)],
        ),
        "crowded": (lossy, crowded),
    }
    (tmp_path / "quantizers").mkdir()
    for name, (scheme, layers) in tables.items():
        file = tmp_path / f"quantizers/wide-{name}.json"
        save_made_quantizer(file, scheme, weights, layers, KV_HEADS, 64)
    found = in_processes(2, tmp_path / "two", all_on_gpus, tmp_path, gpus=True)
    one, whole = on_gpus(tmp_path, None), kernel_codes(None)
    for rank, part in enumerate(found):
        share = HeadShare(rank, 2, KV_HEADS)
        for mine, every in zip(part["codes"], whole, strict=True):
            for x, all_heads in zip(mine, every, strict=True):
                assert torch.equal(x, share.part(all_heads, 1))
        for name in ("wide-lossy", "wide-allocated"):
            logits, tokens, _ = one[name]
            assert part[f"{name}, refused"] == one[f"{name}, refused"]
            assert relative_error(part[name][0], logits) < 0.05
            assert torch.equal(part[name][0], found[0][name][0])
            assert part[name][1] == found[0][name][1]
            assert part[name][2] == rank
            assert [len(x) for x in part[name][1]] == [len(x) for x in tokens]
    told = [part["overflow"] for part in found]
    assert told[0]["told"].startswith("outliers: ") and told[0]["told"] == told[1]["told"]
    assert told[0]["answers"] == told[1]["answers"]
