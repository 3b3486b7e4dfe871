"""`kvquant.calibrate`: the verbs' quantizers in one call, and a model that is as it was before.

Also covers: calibration.collector.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant
from kvquant import cli
from kvquant.calibration.from_texts import model_name
from kvquant.errors import UserError
from kvquant.quantization.quantizer import Quantizer
from kvquant.quantization.quantizer_file import named_tensors
from tests.support.hybrids import tiny_hybrid
from tests.support.models import save_tiny, tiny_model, tiny_tokenizer
from tests.support.text import CORPUS, write_corpus

FEW: dict[str, Any] = {"windows": 2, "window": 128}
HALF = CORPUS[: len(CORPUS) // 2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a text and a study."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "tiny", positions=512)
    write_corpus(work)
    study = {
        "study": "api", "device": "cpu", "seeds": [0], "headline": "nuq3-1pct",
        "models": {"tiny": {"source": "local", "path": str(work / "tiny"), "gpus": 0}},
        "calibration": FEW,
        "schemes": {
            "fp16": {"kind": "fp16"},
            "nuq3-1pct": {"kind": "nuq", "bits": 3},
            "allocated-3": {"kind": "allocated", "bits": 3.4},
            "cq": {"kind": "cq", "bits": 2, "channels": 2, "samples": 256},
            "after": {"kind": "nuq", "bits": 4, "keys": "after-rope"},
        },
        "tasks": {"ppl": {"suite": "perplexity", "dataset": "essays", "window": 64}},
        "pathvars": {"results": str(work / "out")},
    }  # fmt: skip
    (work / "study.json").write_text(json.dumps(study))
    base = ["--study", str(work / "study.json"), "--model", "tiny"]
    model, stats = ["--model-manifest", str(work / "m.json")], str(work / "stats.safetensors")
    data = ["--data-manifest", str(work / "data.json")]
    assert not cli.main(["fetch-model", *base, "--out", model[1]])
    assert not cli.main(["calibrate", *base, *model, *data, "--device", "cpu", "--out", stats])
    return work


@pytest.fixture(scope="module")
def tiny(work: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work / "tiny", dtype=torch.float32)


@pytest.mark.parametrize("name", ["nuq3-1pct", "allocated-3", "cq", "after"])
def test_the_verbs_give_the_same_quantizer(name: str, work: Path) -> None:
    study = json.loads((work / "study.json").read_text())
    file = work / name / "quantizer.json"
    words = ["--study", str(work / "study.json"), "--model", "tiny", "--scheme", name]
    words += ["--stats", str(work / "stats.safetensors"), "--out", str(file)]
    assert not cli.main(["quantize", *words])
    theirs = kvquant.load_quantizer(file)
    given: dict[str, Any] = {"bits": 3} if name == "allocated-3" else {}
    given = given or {"scheme": study["schemes"][name]}
    ours = kvquant.calibrate(work / "tiny", texts=HALF, device="cpu", **given, **FEW)
    assert ours.scheme == theirs.scheme
    assert ours.manifest.weights_sha256 == theirs.manifest.weights_sha256
    assert ours.manifest.calibration_error == theirs.manifest.calibration_error
    found, wanted = named_tensors(ours.layers), named_tensors(theirs.layers)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert ours.tensors_sha256 == theirs.tensors_sha256


def test_it_says_what_it_was_made_from(work: Path) -> None:
    text = " ".join(f"Number {n} is {n * n}." for n in range(700))
    made = kvquant.calibrate(work / "tiny", texts=[text], bits=4, device="cpu", seed=3, **FEW)
    assert repr(made) == "Quantizer('allocated-4' of 'tiny': 2 layers, 4.4 bits)"
    options = made.manifest.calibration
    assert (options["windows"], options["window"], options["seed"]) == (2, 128, 3)
    assert made.manifest.text is not None
    assert made.manifest.text.until == len(text)
    assert made.manifest.text.fingerprints


def test_a_model_in_memory_is_as_before(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.train()
    tiny.requires_grad_(True)
    tiny.model.embed_tokens.weight.requires_grad_(False)
    tiny.model.norm.eval()
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    kinds = [type(module) for module in tiny.modules()]
    modes = [module.training for module in tiny.modules()]
    trained = [parameter.requires_grad for parameter in tiny.parameters()]
    with torch.inference_mode():
        made = kvquant.calibrate(tiny, tiny_tokenizer(), HALF, scheme="nuq2-1pct", **FEW)
    assert made.manifest.weights_sha256 is None
    assert [type(module) for module in tiny.modules()] == kinds
    assert [module.training for module in tiny.modules()] == modes
    assert [parameter.requires_grad for parameter in tiny.parameters()] == trained
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert all(torch.equal(before[name], x) for name, x in tiny.state_dict().items())
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in tiny.modules()]
    assert not any(any(each) for each in hooks)
    tiny.eval().requires_grad_(False)
    assert capsys.readouterr() == ("", "")  # no terminal


def test_a_terminal_sees_the_progress(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    kvquant.calibrate(tiny, tiny_tokenizer(), HALF, **FEW)
    assert "calibrate: 2 of 2 windows (100 %)" in capsys.readouterr().err


def test_texts_are_strings_files_or_an_endless_stream(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "half.txt"
    file.write_text(HALF)
    tokenizer = tiny_tokenizer()
    made = [
        kvquant.calibrate(tiny, tokenizer, texts, scheme="nuq4-1pct", **FEW)
        for texts in (HALF, file, [HALF], [file], iter([HALF]))
    ]
    assert len({one.tensors_sha256 for one in made}) == 1

    def endless() -> Iterator[str]:
        for number in itertools.count():
            yield f"Sentence number {number} is about the grass, which is green. " * 9

    found = kvquant.calibrate(tiny, tokenizer, endless(), scheme="nuq4-1pct", **FEW)
    text = found.manifest.text
    assert text is not None
    assert text.until < 40 * 8 * 2 * 128  # characters of eight times the tokens


def test_a_byte_order_mark_is_no_part_of_a_text(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(HALF)
    (tmp_path / "marked.txt").write_text("\ufeff" + HALF)
    plain, marked = (
        kvquant.calibrate(tiny, tiny_tokenizer(), tmp_path / name, windows=1, window=32)
        for name in ("plain.txt", "marked.txt")
    )
    assert plain.manifest.text == marked.manifest.text


def test_a_given_tokenizer_needs_none_in_the_folder(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(work / "tiny" / name)
    with pytest.raises(UserError, match=r"bare' holds no tokenizer \(tokenizer.json, .*save it"):
        kvquant.calibrate(folder, None, HALF, **FEW, device="cpu")
    made = kvquant.calibrate(folder, tiny_tokenizer(), HALF, windows=1, window=32, device="cpu")
    qm = kvquant.load(folder, quantizer=made, tokenizer=tiny_tokenizer(), device="cpu")
    assert len(kvquant.generate(qm, ["The sky"], 2)) == 1


def test_a_default_window_fits_model_and_texts(tiny: Any) -> None:
    tokenizer = tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kvquant.calibrate(tiny, tokenizer, HALF, windows=1)
    assert found.manifest.calibration["window"] == 512  # the model's positions
    with pytest.warns(UserWarning, match="have .* tokens for 3 windows of .*, which therefore"):
        found = kvquant.calibrate(tiny, tokenizer, HALF[:400], windows=3)
    assert 32 < found.manifest.calibration["window"] < 512


def test_outlier_fractions_follow_the_scheme(tiny: Any) -> None:
    scheme = {"kind": "nuq", "bits": 3, "outliers": 0.005}
    found = kvquant.calibrate(tiny, tiny_tokenizer(), HALF, scheme=scheme, **FEW)
    assert found.manifest.calibration["outlier_fractions"] == [0.0, 0.005, 0.01, 0.02]
    assert found.manifest.scheme == "nuq"


def test_windows_of_a_hybrid_stay_out() -> None:
    model = tiny_hybrid("gemma3", vocab_size=512)
    found = kvquant.calibrate(model, tiny_tokenizer(), HALF, windows=1, window=64)
    assert found.manifest.num_layers == len(found.layers) == 1
    qm = kvquant.load(model, quantizer=found, tokenizer=tiny_tokenizer())
    assert len(kvquant.generate(qm, ["The sky is"], 4)) == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"texts": None}, "texts: are missing"),
        ({"texts": "README.md"}, "texts: 'README.md' is the name of a file; give it as pathlib"),
        ({"texts": "Short.", "window": None}, "fewer than 32: give longer texts"),
        ({"texts": "\n \n" * 999}, "texts: hold nothing but white space"),
        ({"texts": [], "window": None}, "texts: have 0 tokens"),
        ({"texts": {"one": HALF}}, "texts: must be strings or paths, got dict"),
        ({"texts": 3}, "texts: must be strings or paths, got int"),
        ({"texts": ["Short.", 3]}, "texts: number 1 is no string but int"),
        ({"texts": "\ud800" * 99}, "texts: number 0 holds half of a surrogate pair"),
        ({"texts": Path("nowhere.txt")}, "texts: no such file: nowhere.txt"),
        ({"bits": 5}, "bits: 5 is none of 4, 3 and 2"),
        ({"bits": 3, "scheme": "nuq3-1pct"}, "bits: a scheme says its own"),
        ({"scheme": "kivi-4"}, "scheme: 'kivi-4' needs no calibration"),
        ({"scheme": "nuq3"}, "unknown scheme 'nuq3': did you mean nuq"),
        ({"window": 1024}, "window: 1024 exceeds the model's 512 positions"),
        ({"window": 500, "texts": HALF[:400]}, "window: 500 tokens, but the texts have only"),
        ({"window": 8}, "window: "),
        ({"windows": 1.5}, "windows: 1.5 is no whole number as written$"),
        ({"windows": 0}, r"windows: .* \(got 0\)$"),
        ({"scheme": {"kind": ["nuq"]}}, "unknown scheme kind"),
        ({"model": None}, "model: must be a folder, a hub id or a loaded .* model, got NoneType"),
        ({"seed": -1}, "seed: "),
        ({"device": "cpu"}, "model: is loaded"),
        ({"tokenizer": None}, "tokenizer: is missing"),
        ({"tokenizer": "my/model"}, "tokenizer: must be a tokenizer, got str"),
        ({"tokenizer": 3}, "tokenizer: must be a tokenizer, got int"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given: dict[str, Any], told: str, tiny: Any) -> None:
    usual = {"model": tiny, "tokenizer": tiny_tokenizer(), "texts": HALF, **FEW}
    with pytest.raises(UserError) as error:
        kvquant.calibrate(**{**usual, **given})
    assert re.search(told, str(error.value))
    assert "\n" not in str(error.value)


def test_an_unsupported_model_is_refused_before_its_texts_are_read() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=512))

    def texts() -> Iterator[str]:
        raise AssertionError
        yield ""

    with pytest.raises(UserError, match="model: 'GPT2LMHeadModel' is not supported"):
        kvquant.calibrate(model, tiny_tokenizer(), texts())


def test_models_that_cannot_be_calibrated_are_refused_in_one_line() -> None:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        without_gradients = tiny_model(vocab_size=512)
    with torch.device("meta"):
        without_weights = AutoModelForCausalLM.from_config(without_gradients.config)
    for model, told in (
        (without_gradients, "model: was made in torch.inference_mode"),
        (without_weights, "device_map: the model is on meta"),
        (tiny_model(), "tokenizer: gives the id"),  # of 97 tokens
    ):
        with pytest.raises(UserError, match=told):
            kvquant.calibrate(model, tiny_tokenizer(), HALF, **FEW)


def test_names_of_models_hold_no_paths(tmp_path: Path) -> None:
    assert model_name("owner/name") == "owner/name"
    assert model_name(tmp_path / "some" / "model") == "model"
    model = tiny_model()
    assert model_name(model) == "LlamaForCausalLM"
    model.name_or_path = str(tmp_path)
    assert model_name(model) == tmp_path.name
    assert isinstance(kvquant.Quantizer, type) and kvquant.Quantizer is Quantizer
