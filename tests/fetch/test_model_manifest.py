"""A model whose files changed after fetch-model is refused, and the file is named.

Also covers: fetch.file_hashes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.fetch import file_hashes
from kvquant.fetch.model import fetch_model
from kvquant.fetch.model_manifest import (
    identity_of,
    manifest_beside,
    read_manifest,
    study_manifest,
    verify_model,
)
from kvquant.models import base_model
from kvquant.models.loading import load_base_model, load_quantized_model, load_tokenizer
from kvquant.study.models import ModelSpec
from tests.support.models import save_tiny
from tests.support.mutations import damaged_copy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "home"))


@pytest.fixture
def manifest(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVQUANT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "manifest.json"
    fetch_model("tiny", ModelSpec(source="local", path=str(home)), out)
    return out


def flip(file: Path) -> None:
    """One bit in the middle, with size and times as before."""
    times = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(times.st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(times.st_size // 2)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def edit(file: Path) -> None:
    """Still good JSON, with another value."""
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 7.0}))


def exchange(file: Path) -> None:
    """Another file of the same size and modification time takes its place."""
    times, other = file.stat(), file.with_name("other")
    shutil.copy(file, other)
    flip(other)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("model.safetensors", flip),
    ("model.safetensors", zero),
    ("model.safetensors", exchange),
    ("model.safetensors", Path.unlink),
    ("config.json", edit),
    ("generation_config.json", edit),
    ("tokenizer.json", flip),
    ("tokenizer_config.json", edit),
    ("chat_template.jinja", lambda file: file.write_text("{{ messages }}")),
    ("model-00002-of-00002.safetensors", Path.touch),
    ("adapter_config.json", Path.touch),
    ("model.safetensors.index.json", Path.touch),
    ("vocab.json", Path.touch),
]


@pytest.mark.fault(
    "custody",
    "a bit flipped with the times put back, zeros, an exchanged, edited, removed or added "
    "file of a model",
    "refused; the file is named",
)
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_changed_file_is_named(
    home: Path,
    manifest: Path,
    name: str,
    change: Callable[[Path], None],
    settled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if settled:  # every hash is remembered, however fresh the file
        monkeypatch.setattr(file_hashes, "SETTLED_NS", -(10**12))
    found = read_manifest(manifest)
    verify_model(found)
    verify_model(found)
    change(home / name)
    with pytest.raises(UserError, match=f"--model-manifest: .*/{name}") as error:
        load_quantized_model(found, device="cpu")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=name):
        load_base_model(read_manifest(manifest), device="cpu")
    if not name.endswith(".safetensors") or change in (Path.touch, Path.unlink):
        with pytest.raises(UserError, match=name):
            load_tokenizer(found)


def test_unchanged_files_are_not_read_again(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -(10**12))
    found = read_manifest(manifest)
    verify_model(found)

    def read(self: Any, names: list[str]) -> Any:
        raise AssertionError(f"{names} read again")

    monkeypatch.setattr(file_hashes.FileHashes, "_read", read)
    verify_model(found)
    # The cache is private, and a cache that others could have written is not believed.
    (kept,) = (tmp_path / "cache" / "hashes").iterdir()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    kept.chmod(0o666)
    with pytest.raises(AssertionError):
        verify_model(found)
    kept.chmod(0o600)
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(AssertionError):
        verify_model(found)


def test_fresh_files_are_hashed_again(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change within the same tick of the file system's clock leaves no trace in the times."""
    verify_model(read_manifest(manifest))

    def read(self: Any, names: list[str]) -> Any:
        raise AssertionError

    monkeypatch.setattr(file_hashes.FileHashes, "_read", read)
    with pytest.raises(AssertionError):
        verify_model(read_manifest(manifest))


def test_no_home_hashes_every_time(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVQUANT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    verify_model(read_manifest(manifest))
    monkeypatch.setenv("KVQUANT_CACHE", "/dev/null/cache")
    verify_model(read_manifest(manifest))


def test_a_study_says_how_its_model_is_loaded(
    home: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dtype reaches the loader with the manifest, which itself is of every dtype."""
    spec = ModelSpec(source="local", path=str(home), dtype="bfloat16")
    study = SimpleNamespace(model=lambda name: spec)
    found = study_manifest(manifest, study, "tiny")  # type: ignore[arg-type]
    assert found.dtype == "bfloat16"
    asked: list[str | None] = []

    def default(config: Any, device: torch.device, on_gpu: str | None = None) -> torch.dtype:
        asked.append(on_gpu)
        return torch.float32

    monkeypatch.setattr(base_model, "default_dtype", default)
    load_quantized_model(found)
    load_quantized_model(read_manifest(manifest))
    assert asked == ["bfloat16", None]


def test_older_manifest_is_upgraded_by_fetching_again(home: Path, manifest: Path) -> None:
    new = json.loads(manifest.read_text())
    old = {key: value for key, value in new.items() if key not in ("files", "identity")}
    manifest.write_text(json.dumps({**old, "schema_version": 1}))
    with pytest.raises(UserError, match=r"older version.*run fetch-model again"):
        read_manifest(manifest)
    fetch_model("tiny", ModelSpec(source="local", path=str(home)), manifest)
    assert json.loads(manifest.read_text()) == new
    # Not if the weights are others than those it stood for.
    manifest.write_text(json.dumps({**old, "schema_version": 1, "weights_sha256": "0" * 64}))
    with pytest.raises(UserError, match="exists with other content"):
        fetch_model("tiny", ModelSpec(source="local", path=str(home)), manifest)


@pytest.mark.fault(
    "custody",
    "an edited manifest of a model",
    "refused",
)
def test_edited_manifest_is_refused(home: Path, manifest: Path) -> None:
    facts = json.loads(manifest.read_text())
    for change in (
        {"weights_sha256": "0" * 64},
        {"identity": "0" * 64},
        {"files": {**facts["files"], "config.json": "0" * 64}},
    ):
        manifest.write_text(json.dumps({**facts, **change}))
        with pytest.raises(UserError, match="was edited"):
            verify_model(read_manifest(manifest))
    other = {**facts["files"], "config.json": "0" * 64}
    agreeing = {"files": other, "identity": identity_of(other, facts["weights_sha256"])}
    manifest.write_text(json.dumps({**facts, **agreeing}))
    with pytest.raises(UserError, match=r"config\.json changed"):
        verify_model(read_manifest(manifest))


@pytest.mark.fault(
    "custody",
    "a manifest that points outside its folder, or of wrong types",
    "refused",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "hub"}, "outside"),
        ({"directory": "../home"}, "inside"),
        ({"directory": ""}, "directory"),
        ({"files": {}}, "files"),
        ({"files": {"../home/config.json": "0" * 64}}, "not a file of a model's folder"),
        ({"files": {"/etc/tokenizer.json": "0" * 64}}, "not a file of a model's folder"),
        ({"files": {"config.json": 1}}, "no sha256"),
        ({"weights_sha256": 7}, "weights_sha256"),
        ({"source": "ftp"}, "unknown"),
        ({"revision": 1}, "revision"),
    ],
)
def test_manifest_that_points_outside_or_is_of_wrong_types(
    manifest: Path, change: dict[str, Any], message: str
) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        read_manifest(manifest)
    assert len(str(error.value).splitlines()) == 1 and "manifest.json" in str(error.value)


def test_a_fetched_folder_is_verified_without_its_manifest_being_named(
    home: Path, manifest: Path
) -> None:
    facts = {**json.loads(manifest.read_text()), "source": "hub", "directory": "."}
    (home / "manifest.json").write_text(json.dumps(facts))
    assert load_quantized_model(home, device="cpu").inputs == {"model": facts["identity"]}
    flip(home / "tokenizer.json")
    for load in (load_base_model, load_quantized_model, load_tokenizer):
        with pytest.raises(UserError, match=r"tokenizer\.json changed"):
            load(str(home))
    (home / "manifest.json").write_text("[]")  # another program's
    load_tokenizer(save_tiny(home.parent / "plain"))


def test_a_linked_manifest_is_of_the_folder_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched/manifest.json").write_text('{"directory": ".", "files": {}}')
    (tmp_path / "made of links").mkdir()
    (tmp_path / "made of links/manifest.json").symlink_to(tmp_path / "fetched/manifest.json")
    assert manifest_beside(tmp_path / "made of links") is None
    with pytest.raises(UserError):
        manifest_beside(tmp_path / "fetched")


def test_identity_follows_every_file_and_no_place(saved: Path, home: Path, tmp_path: Path) -> None:
    def fetched(folder: Path, name: str) -> str:
        found = fetch_model("m", ModelSpec(source="local", path=str(folder)), tmp_path / name)
        return str(found["identity"])

    first = fetched(saved, "a")
    assert first == fetched(home, "b")
    edit(home / "generation_config.json")
    assert fetched(home, "c") != first


@pytest.mark.fault(
    "custody",
    "any byte of a manifest",
    "without effect, or one line",
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_line(manifest: Path, data: st.DataObject) -> None:
    file = damaged_copy(manifest, data)
    try:
        verify_model(read_manifest(file))
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.fault(
    "custody",
    "a checkpoint that lacks a tensor",
    "refused; the tensor is named, nothing is drawn at random",
)
def test_weights_that_lack_a_tensor_are_refused(home: Path) -> None:
    """Otherwise transformers would fill it with random numbers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(home / "model.safetensors")
    gone = next(name for name in tensors if "k_proj" in name)
    del tensors[gone]
    save_file(tensors, home / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack {gone}"):
        load_base_model(home, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"[]", b"null"])
def test_damaged_file_without_manifest_is_one_line(home: Path, name: str, content: bytes) -> None:
    (home / name).write_bytes(content)
    with pytest.raises(UserError, match="model: cannot load") as error:
        load_base_model(home, device="cpu")
    assert len(str(error.value).splitlines()) == 1
