"""Quantizers in memory, in folders and on a hub that functions of ours stand in for.

Also covers: quantization.quantizer_card, fetch.hub.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvquant
from kvquant.errors import UserError
from kvquant.fetch.hub import is_repository_id
from kvquant.quantization.quantizer import FILES, Quantizer
from kvquant.quantization.quantizer_card import MARK
from kvquant.quantization.quantizer_file import named_tensors
from tests.support.models import save_tiny, tiny_model, tiny_tokenizer
from tests.support.text import CORPUS

FEW: dict[str, Any] = {"windows": 1, "window": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), positions=256)


@pytest.fixture(scope="module")
def made(folder: Path) -> Quantizer:
    return kvquant.calibrate(folder, texts=CORPUS, device="cpu", **FEW)


def test_saved_and_read_again_it_is_the_same(made: Quantizer, tmp_path: Path) -> None:
    assert made.save(tmp_path / "new/folder") == tmp_path / "new/folder"
    names = {file.name for file in (tmp_path / "new/folder").iterdir()}
    assert names == {*FILES, "README.md"}  # no pickle among them
    for source in (tmp_path / "new/folder", str(tmp_path / "new/folder/quantizer.json")):
        again = kvquant.load_quantizer(source)
        assert again.scheme == made.scheme
        assert (again.bits, again.model) == (3.4, made.model)
        assert again.tensors_sha256 == made.tensors_sha256
        found, wanted = named_tensors(again.layers), named_tensors(made.layers)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again.save(tmp_path / "copy")
    for name in FILES:
        ours = (tmp_path / "copy" / name).read_bytes()
        assert ours == (tmp_path / "new/folder" / name).read_bytes()


def test_the_card_names_model_scheme_bits_and_calibration(made: Quantizer, tmp_path: Path) -> None:
    text = (made.save(tmp_path) / "README.md").read_text()
    for words in (
        f"of {made.model}",
        "Allocated codes 3.4 bits (`allocated-3`)",
        "2 that see all tokens, 2 key/value heads of 16 channels",
        f"1 windows of 64 tokens, seed 0, from {len(CORPUS):,} characters of given texts",
        "library_name: kvquant",
    ):
        assert words in text
    (tmp_path / "README.md").write_text(text.replace(MARK, "") + "Mine.")
    made.save(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("Mine.")


def test_a_home_folder_that_nobody_has_takes_one_line(made: Quantizer) -> None:
    with pytest.raises(UserError, match="folder: '~nobody-of-this-name/q': no home folder"):
        made.save("~nobody-of-this-name/q")
    with pytest.raises(UserError, match="quantizer: '~nobody-of-this-name/q': no home folder"):
        kvquant.load_quantizer("~nobody-of-this-name/q")


def test_a_models_folder_is_refused(made: Quantizer, folder: Path) -> None:
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(UserError, match=r"folder: .* is a model's folder"):
        made.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize("given", ["", " ", None, 5, "a\0b", "a" * 300])
def test_what_names_no_folder_is_refused(
    made: Quantizer, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folder: "):
        made.save(given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("nowhere", {}, "quantizer: nowhere is no folder, no quantizer.json and no hub id"),
        ("nowhere/quantizer.json", {}, "quantizer: no such file: nowhere/quantizer.json"),
        ("{}", {}, "quantizer: no such file: .*quantizer.json"),
        ("{}", {"revision": "main"}, "revision: .* is no hub repository"),
    ],
)
def test_what_is_no_quantizer_is_refused(
    source: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        kvquant.load_quantizer(source.format(tmp_path), **options)


@pytest.mark.parametrize("given", ["folder", "memory"])
@pytest.mark.parametrize("calibrated", ["folder", "memory"])
def test_other_weights_are_refused(
    given: str, calibrated: str, made: Quantizer, folder: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    torch.manual_seed(8)
    other: Any = LlamaForCausalLM(config)
    own: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if calibrated == "memory":
        made = kvquant.calibrate(own, tiny_tokenizer(), CORPUS, **FEW)
    if given == "folder":
        other.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        other, own = tmp_path, folder
    for quantizer in (made, made.save(tmp_path / "quantizer")):
        assert kvquant.load(own, quantizer=quantizer).scheme == made.scheme
        with pytest.raises(UserError, match=r"quantizer: .* was built for .*build one for this"):
            kvquant.load(other, quantizer=quantizer)


def test_another_shape_or_scheme_is_refused(made: Quantizer) -> None:
    with pytest.raises(UserError, match=r"is for 2 layers of 2 x 16, the model has 2 .* of 4 x 16"):
        kvquant.load(tiny_model(kv_heads=4), quantizer=made)
    with pytest.raises(UserError, match=r"with kind: allocated, not for kind: kivi"):
        kvquant.load(tiny_model(), "kivi-4", quantizer=made)


class Hub:
    """Repositories in a folder, by the functions of huggingface_hub that are used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[Any, ...]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of the functions."""
        import huggingface_hub

        hub = self
        for name in ("create_repo", "create_branch", "file_exists", "upload_folder"):

            def call(api: Any, *args: Any, name: str = name, **kwargs: Any) -> Any:
                hub.asked.append((name, args, kwargs, api.token))
                return getattr(hub, name)(*args, **kwargs)

            monkeypatch.setattr(huggingface_hub.HfApi, name, call)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)

    def create_repo(self, repo_id: str, **_: Any) -> None:
        """Makes a repository."""
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)

    def create_branch(self, repo_id: str, **_: Any) -> None:
        """Has one branch for all."""

    def file_exists(self, repo_id: str, name: str, **_: Any) -> bool:
        """Whether a repository has a file."""
        return (self.folder / repo_id / name).exists()

    def hf_hub_download(self, repo_id: str, name: str, **_: Any) -> str:
        """The path of a file."""
        return str(self.folder / repo_id / name)

    def upload_folder(
        self, repo_id: str, folder_path: str, allow_patterns: list[str], **_: Any
    ) -> Any:
        """Copies what the patterns allow."""
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.folder / repo_id / name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        """The folder of a repository."""
        self.asked.append(("snapshot_download", (repo_id,), options, None))
        if not (self.folder / repo_id).exists():
            raise OSError("no such repository")
        return str(self.folder / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    found.install(monkeypatch)
    return found


def test_what_is_pushed_can_be_pulled(made: Quantizer, folder: Path, hub: Hub) -> None:
    url = made.push_to_hub("you/tiny-3bit", private=True, token="t", revision="v1")
    assert url == "https://hub/you/tiny-3bit/commit/1"
    name, args, options, token = hub.asked[0]
    assert (name, args, options["private"], token) == ("create_repo", ("you/tiny-3bit",), True, "t")
    assert [asked[0] for asked in hub.asked].count("upload_folder") == 1
    assert {asked[2].get("revision") for asked in hub.asked[2:]} == {"v1"}
    files = {file.name for file in (hub.folder / "you/tiny-3bit").iterdir()}
    assert files == {*FILES, "README.md"}
    card = (hub.folder / "you/tiny-3bit/README.md").read_text()
    assert 'quantizer="you/tiny-3bit"' in card
    again = Quantizer.from_pretrained("you/tiny-3bit", revision="v1")
    assert hub.asked[-1][2]["revision"] == "v1"
    assert set(hub.asked[-1][2]["allow_patterns"]) == set(FILES)
    assert again.tensors_sha256 == made.tensors_sha256
    qm = kvquant.load(folder, quantizer="you/tiny-3bit", device="cpu")
    assert qm.scheme == made.scheme


def test_an_own_card_on_the_hub_stays(
    made: Quantizer, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    made.push_to_hub("you/q")
    made.push_to_hub("you/q")
    assert capsys.readouterr().err == ""
    card = hub.folder / "you/q/README.md"
    card.write_text("Mine.")
    made.push_to_hub("you/q")
    assert card.read_text() == "Mine."
    assert "has a README.md of yours, which stays" in capsys.readouterr().err


def test_a_models_repository_and_odd_names_are_refused(made: Quantizer, hub: Hub) -> None:
    (hub.folder / "you/model").mkdir(parents=True)
    (hub.folder / "you/model/config.json").write_text("{}")
    with pytest.raises(UserError, match="repo_id: you/model is a model's repository"):
        made.push_to_hub("you/model")
    assert not any(asked[0] == "upload_folder" for asked in hub.asked)
    with pytest.raises(UserError, match="repo_id: 'model' is not of the form owner/name"):
        made.push_to_hub("model")
    with pytest.raises(UserError, match=r"hub repository you/model holds no quantizer.json"):
        kvquant.load_quantizer("you/model")
    with pytest.raises(UserError, match="no such folder here, and hub repository you/none"):
        kvquant.load_quantizer("you/none")


def test_a_hub_that_cannot_be_reached_takes_one_line(
    made: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as error:
        kvquant.load_quantizer("you/none-at-all")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("quantizer: no such folder here, and hub repository you/")


@pytest.mark.parametrize("name", ["a/b", "HuggingFaceTB/SmolLM2-135M", "a-1/b.c_d"])
def test_ids_of_repositories(name: str) -> None:
    assert is_repository_id(name)


@pytest.mark.parametrize("name", ["a", "a/b/c", "/a", "../b", "a/", "a b/c", "a/" + "b" * 300])
def test_no_ids_of_repositories(name: str) -> None:
    assert not is_repository_id(name)
