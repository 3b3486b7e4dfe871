"""Tensor parallelism: processes with some of the kv heads each give what one process gives.

They are started once for many checks; each returns what it found, and the tests compare it.
Also covers: formats.head_share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kvquant.cache.footprint import cache_elements
from kvquant.errors import UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.formats.head_share import HeadShare
from kvquant.kernels.pytorch_fused import split_outliers
from kvquant.kernels.shared_outliers import split_shared_outliers
from kvquant.models.loading import load_quantized_model
from kvquant.models.tensor_parallel import plan_options
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.scheme_kinds import SCHEME_KINDS
from kvquant.study.schemes import (
    KvquantRefScheme,
)
from tests.support.cache_uses import USES, fed
from tests.support.caches import CLOSE
from tests.support.head_codes import DIM, HEADS, KV_HEADS, PACKING, codes, outlier_rows
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.processes import in_processes
from tests.support.quantizers import (
    narrow_tables,
    save_made_quantizer,
)
from tests.support.shared_models import (
    FP8,
    WITHOUT_PLAN,
    generated,
    load,
    of_family,
    refusals,
    save,
    short,
)

# transformers has no plan for these
FAMILIES = [name for name in MODEL_FAMILIES if name not in (WITHOUT_PLAN, "gpt_oss")]
CHOSEN = ["llama", "qwen3", "phi3", "mixtral"]  # by norms, fused projections, experts
WINDOWS = "gemma3+windows"
TOLERANCE: dict[str, Any] = {"atol": 5e-4, "rtol": 5e-4}


def all_of(folder: Path, families: list[str]) -> dict[str, Any]:
    """Everything that one of two processes finds."""
    found: dict[str, Any] = {name: short(folder, name, "auto") for name in families}
    found |= {f"all of {name}": of_family(folder, name, "auto") for name in CHOSEN}
    found["generated"] = generated(folder, "auto")
    qm = load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    given = AutoModelForCausalLM.from_pretrained(
        folder / "llama",
        dtype=torch.float32,
        distributed_config=DistributedConfig(tp_plan="auto"),
    )
    of_loaded = load_quantized_model(given, FP8)
    assert of_loaded.share == qm.share
    found["loaded"] = fed(qm.model, of_loaded.new_cache())  # its cache fits either
    assert qm.share is not None
    found["share"] = (qm.share.rank, qm.share.count, qm.share.own)
    found["codes"] = codes(qm.share)
    rows = outlier_rows()
    found["outliers"] = [
        split_shared_outliers(qm.share.part(rows, 1), side, qm.share) for side in (0, 1, 5, 15, 16)
    ]
    found["refused"] = refusals(folder, qm)
    return found


def some_of(folder: Path) -> dict[str, Any]:
    """What one of four processes, with one head each, finds."""
    found: dict[str, Any] = {
        name: short(folder, name, "auto") for name in ("llama", "phi3", "mixtral")
    }
    qm = load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    assert qm.share is not None
    found["codes"] = codes(qm.share)
    return found


def eight_heads(folder: Path, tp_plan: str | None) -> dict[str, Any]:
    """What a model of eight kv heads gives over caches of the schemes that are shared most."""
    found: dict[str, Any] = {}
    for path in ("exact", "lossy", "allocated"):
        qm = load(folder, "eight", path, tp_plan)
        cache = qm.new_cache()
        found[path] = fed(qm.model, cache)
        found[f"elements of {path}"] = cache_elements(cache)
        found["share"] = None if qm.share is None else (qm.share.rank, qm.share.count)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("models")
    for name in [*FAMILIES, WINDOWS, WITHOUT_PLAN]:
        save(made, name)
    for name, model in (
        ("three", tiny_model("llama", 6, 3, vocab_size=512)),
        ("norms", tiny_model("cohere", HEADS, KV_HEADS, vocab_size=512, use_qk_norm=True)),
    ):
        model.save_pretrained(made / name)
        tiny_tokenizer().save_pretrained(made / name)
    save(made, "llama", "eight", 8)
    scheme = KvquantRefScheme(kind="kvquant-ref", bits=3)
    weights, _ = FileHashes(made / "llama", "model").of_all(["model.safetensors"])
    tables = narrow_tables(scheme, KV_HEADS, DIM)
    save_made_quantizer(made / "quantizers/procedure.json", scheme, weights, tables, KV_HEADS)
    return made


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return in_processes(2, folder / "two", all_of, folder, [*FAMILIES, WINDOWS])


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    """What each of four processes found."""
    return in_processes(4, folder / "four", some_of, folder)


def same_as_one(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Each process's logits are those of one process; it holds its part of what that holds."""
    for part in found:
        for use in USES:
            torch.testing.assert_close(part[use], one[use], **CLOSE)
            torch.testing.assert_close(part[use], found[0][use], atol=0, rtol=0)
        torch.testing.assert_close(part["chunks and steps"], one["plain"], **CLOSE)
        # Rounding may move single numbers to the next code.
        assert float((part["3 bits"] - one["3 bits"]).abs().mean()) < 1e-3
        assert part["elements"] * len(found) == one["elements"]
    total = sum(part["bytes"] for part in found)
    assert one["bytes"] <= total < 1.15 * one["bytes"]


@pytest.mark.feature("tensor parallel, 2 processes")
@pytest.mark.parametrize("family", [*FAMILIES, WINDOWS])
def test_two_processes(family: str, folder: Path, two: list[dict[str, Any]]) -> None:
    one = short(folder, family, None)
    for part in two:
        torch.testing.assert_close(part[family], one, **CLOSE)
        assert torch.equal(part[family], two[0][family])


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_four_processes_with_a_head_each(
    family: str, folder: Path, four: list[dict[str, Any]]
) -> None:
    one = short(folder, family, None)
    for part in four:
        torch.testing.assert_close(part[family], one, **CLOSE)


def test_eight_processes_with_a_head_each(folder: Path) -> None:
    """As on a node of eight GPUs with a model of eight kv heads."""
    found = in_processes(8, folder / "eight processes", eight_heads, folder, "auto")
    one = eight_heads(folder, None)
    assert [part["share"] for part in found] == [(rank, 1) for rank in range(8)]
    for part in found:
        torch.testing.assert_close(part["exact"], one["exact"], **CLOSE)
        for path in ("lossy", "allocated"):
            # Rounding may move single numbers to the next code.
            assert float((part[path] - one[path]).abs().mean()) < 1e-3
        for path in ("exact", "lossy", "allocated"):
            assert torch.equal(part[path], found[0][path])
            assert 8 * part[f"elements of {path}"] == one[f"elements of {path}"]


@pytest.mark.parametrize("family", CHOSEN)
def test_all_uses_of_a_cache(family: str, folder: Path, two: list[dict[str, Any]]) -> None:
    same_as_one([part[f"all of {family}"] for part in two], of_family(folder, family, None))


def test_generation_and_other_caches(folder: Path, two: list[dict[str, Any]]) -> None:
    one = generated(folder, None)
    for part in (part["generated"] for part in two):
        assert part["folded"] and one["folded"]
        assert one["fused, folded"] and not part["fused, folded"]  # rotated as they are packed
        assert part["greedy"] == one["greedy"]
        assert [2 * n for n in part["row_elements"]] == one["row_elements"]
        for name in ("beam search", "prompt lookup", "sampling, several sequences"):
            assert torch.equal(part[name], one[name])
        for name in [n for n in one if n.startswith(("allocated", "fused, a", "protocol"))]:
            assert float((part[name] - one[name]).abs().mean()) < 1e-3, name
        torch.testing.assert_close(part["fp16-static"], one["fp16-static"], **TOLERANCE)
        torch.testing.assert_close(part["fp8"], one["fp8"], **TOLERANCE)
        assert torch.equal(part["fp8"], two[0]["loaded"])
        for scheme in ("fp16-static", "fp8"):
            assert 2 * part[f"bytes of {scheme}"] == one[f"bytes of {scheme}"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_head_has_the_codes_that_one_process_gives_it(
    ranks: int, request: pytest.FixtureRequest
) -> None:
    """Bit for bit, and ranges that all heads of a token share are those of all."""
    whole = codes(None)
    for rank, found in enumerate(request.getfixturevalue({2: "two", 4: "four"}[ranks])):
        share = HeadShare(rank, ranks, KV_HEADS)
        for scheme, parts, one in zip(PACKING, found["codes"], whole, strict=True):
            for part, every in zip(parts, one, strict=True):
                own = share.part(every, 1) if every.dim() == 4 else every
                assert torch.equal(part, own), scheme


def test_every_kind_that_splits_heads_is_compared() -> None:
    kinds = {kind.name for kind in SCHEME_KINDS.values() if kind.splits_heads}
    assert kinds == {scheme.kind for scheme in PACKING} | {"fp16", "fp16-static"}


def test_outliers_of_a_token_are_those_of_all_heads(two: list[dict[str, Any]]) -> None:
    rows = outlier_rows()
    for at, side in enumerate((0, 1, 5, 15, 16)):
        mask, low, high = split_outliers(rows, side)
        parts = [part["outliers"][at] for part in two]
        assert torch.equal(torch.cat([part[0] for part in parts], 1), mask)
        for part in parts:
            assert torch.equal(part[1], low)
            assert torch.equal(part[2], high)


def test_a_process_has_heads_by_its_rank(two: list[dict[str, Any]]) -> None:
    assert [part["share"] for part in two] == [(0, 2, slice(0, 2)), (1, 2, slice(2, 4))]


@pytest.mark.refused(
    "{what}", "`tp_plan`, or the option or number beside it that does not fit, and what to do"
)
@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("calibrate", "calibration by processes that share a model",
         "tp_plan: calibration sees all heads at once; load the model without"),
        ("procedure", "`kvquant-ref` with `tp_plan`",
         "tp_plan: scheme kind 'kvquant-ref' codes the kv heads of a token together"),
        ("quanto", "`hf-quanto`, `hf-hqq` and `hf-fp8` with `tp_plan`",
         "tp_plan: scheme kind 'hf-fp8' codes the kv heads of a token together"),
        ("device_map", "`device_map` or `device` beside `tp_plan`",
         "device_map: cannot be given beside tp_plan"),
        ("device", "`device_map` or `device` beside `tp_plan`",
         "device: tp_plan gives each process its own; leave device out"),
        ("plan", "another `tp_plan` than \"auto\"", "tp_plan: 'mine' is not 'auto'"),
        ("no plan", "a family without a plan in transformers (StableLM, GPT-OSS)",
         "tp_plan: transformers has no plan for StableLM; load the model"),
        ("heads", "a number of processes that does not divide the kv heads",
         "tp_plan: 2 processes cannot share 3 kv heads (num_key_value_heads) evenly; start 1 or 3 "
         "(torchrun --nproc-per-node)"),
        ("norms", "norms with weights for each head (`use_qk_norm` of Cohere)",
         "tp_plan: layer 0 has a norm for each head (q_norm)"),
        ("loaded", "`tp_plan` for a loaded model, which may have been loaded with one",
         "model: is loaded; move or convert it before it is given"),
        ("graph", "CUDA graphs of decode steps (`generate` goes on without)",
         "model: processes share its heads (tp_plan); call the model"),
    ],
)  # fmt: skip
def test_refused_by_name(name: str, what: str, words: str, two: list[dict[str, Any]]) -> None:
    for part in two:
        assert part["refused"][name].startswith(words)


@pytest.mark.refused("`tp_plan` without processes", "`tp_plan`; `torchrun`")
def test_without_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^tp_plan: there are no processes .* `torchrun"):
        load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    alone = load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    assert alone.share is None


@pytest.mark.parametrize("told", ["", "x", "0", "-2"])
def test_a_number_of_processes_that_is_none(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model("llama", HEADS, KV_HEADS).config
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", told)):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^tp_plan: WORLD_SIZE is '{told}', which is no number"):
        plan_options(config, "auto", "auto", None)


@pytest.mark.refused("more processes than GPUs", "`tp_plan`; how many to start")
def test_fewer_gpus_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model("llama", HEADS, KV_HEADS).config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match=r"^tp_plan: 4 processes .* sees 2 GPU\(s\); start 2"):
        plan_options(config, "auto", "auto", None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of two machines
    assert plan_options(config, "auto", "auto", None)["distributed_config"].tp_size == 4


def program(folder: Path) -> list[int]:
    """What docs/tensor-parallelism.md starts in each process."""
    torch.set_num_threads(1)
    quantizer = folder / "quantizers/llama-allocated.json"
    qm = load_quantized_model(folder / "llama", quantizer=quantizer, tp_plan="auto")
    cache = qm.new_cache()
    ids = qm.tokenizer("The cache", return_tensors="pt").input_ids.to(qm.device)
    out = qm.model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert qm.share is not None
    torch.distributed.destroy_process_group()
    return [qm.share.ranks, out.shape[1] - ids.shape[1], cache.layers[0].store.kv_heads]


def test_a_program_under_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function of torch that `torchrun` calls, from which processes need not import."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="tests",
        start_method="spawn" if torch.cuda.is_available() else "fork",
    )  # fmt: skip
    assert elastic_launch(config, program)(folder) == {0: [2, 40, 2], 1: [2, 40, 2]}
