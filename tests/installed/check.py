"""Uses the installed package as a stranger would, on a tiny model; run outside the repository.

`.ci/installed` runs it with the wheel and the lowest and the newest releases that its ranges allow:
import, calibrate, build, generate (prefill, padded batch, decode steps), the Python API, evaluate
under both protocols. It needs a package index for the text of the calibration. With the argument
`library` it checks what needs no extra, where none is installed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import kvquant
import kvquant.cli
from kvquant.models.loading import load_quantized_model, read_manifest
from kvquant.study.config import load_study
from kvquant.study.records import EvalRecord, read_record
from kvquant.study.schemes import Fp8Scheme

STUDY: dict[str, Any] = {
    "study": "installed",
    "device": "cpu",
    "seeds": [0],
    "headline": "nuq4",
    "models": {"tiny": {"source": "local", "path": "tiny", "gpus": 0}},
    "calibration": {"windows": 2, "window": 128},
    "schemes": {
        "fp16": {"kind": "fp16"},
        "nuq4": {"kind": "nuq", "bits": 4, "block_size": 32},
        "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 32},
    },
    "tasks": {
        "ppl-a": {"suite": "perplexity", "dataset": "essays", "window": 96, "windows": 1},
        "ppl-b": {"suite": "perplexity", "dataset": "essays", "window": 96, "windows": 1},
        "passkey": {"suite": "passkey", "length": 600, "samples": 1, "batch_size": 1},
    },
    "pathvars": {"results": "out"},
}
STUDY["tasks"]["ppl-a"] |= {"protocol": "A", "chunk": 40}


SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def save_tiny(folder: Path) -> None:
    """A random Llama of two layers with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=1024, bos_token_id=None, eos_token_id=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def verb(*words: str) -> None:
    """Runs `kvquant VERB …` in this process, which has imported torch already."""
    if status := kvquant.cli.main(words):
        raise SystemExit(f"kvquant {' '.join(words)}: exit status {status}")


def check_generation(manifest: Path, quantizer: Path) -> None:
    """A 4-bit cache answers as the unquantized one for its first token, alone and padded."""
    study = load_study("study.json")
    model = load_quantized_model(
        read_manifest(manifest), study.scheme("nuq4"), quantizer=quantizer, device="cpu"
    )
    torch.manual_seed(1)
    rows = torch.randint(0, 256, (2, 80))
    mask = torch.ones_like(rows)
    mask[1, :30] = 0
    rows[1, :30] = 256
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    for ids, seen in ((rows[:1], mask[:1]), (rows, mask)):
        given = {"input_ids": ids, "attention_mask": seen, **options}
        cache = model.new_cache()
        ours = model.model.generate(**given, past_key_values=cache)
        plain = model.model.generate(**given)
        first = ids.shape[1]
        assert torch.equal(ours[:, first], plain[:, first]), "the prefill is not exact"
        assert cache.get_seq_length() >= first, "the cache was not used"


def check_library() -> None:
    """The Python API: a quantizer from a text, saved, read again, and answers over its cache."""
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 9
    made = kvquant.calibrate("tiny", texts=text, bits=4, windows=2, window=128, device="cpu")
    model = kvquant.load("tiny", quantizer=made.save("quantizer"), device="cpu")
    prompts = ["The sky", "There and back again. " * 4]
    greedy = kvquant.generate(model, prompts, 6)
    assert greedy == kvquant.generate(model, prompts, 6, top_k=1), "two ways differ"
    kvquant.generate(model, prompts, 6, stop_strings=["e"], num_beams=2)


def check_window() -> None:
    """A model whose first layer has a window, and a rotary table of its own, answers over it."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(2)
    config = Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    loaded = load_quantized_model(model, Fp8Scheme(kind="fp8"))
    tokens, cache = torch.randint(0, 256, (2, 120)), loaded.new_cache()
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        parts = [
            model(input_ids=part, past_key_values=cache).logits
            for part in tokens.split([90, 1, 29], 1)
        ]
    error = (torch.cat(parts, 1) - expected).norm() / expected.norm()
    assert 0 < error < 0.05, f"logits over a window differ by {error:.3f}"


def check_without_extras() -> None:
    """The library works, and a verb of the workflow says what it lacks."""
    assert importlib.util.find_spec("pandas") is None, "an extra is installed"
    save_tiny(Path("tiny"))
    check_library()
    check_window()
    words = [
        "aggregate",
        "--study",
        "s",
        "--results",
        "r",
        "--device-name",
        "cpu",
        "--out-dir",
        "o",
    ]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert kvquant.cli.main(words) == 2
    assert "pip install 'kvquant[workflow]'" in told.getvalue(), told.getvalue()
    verb("doctor", "--offline", "--model", "tiny")
    verb("capacity", "--model", "tiny", "--memory", "4GB")
    packages = len(list(importlib.metadata.distributions()))
    print(
        f"kvquant {importlib.metadata.version('kvquant')}, {packages} packages: the library works"
    )


def main() -> None:
    """Runs every step in the current folder, which is empty."""
    home = Path(kvquant.__file__).resolve().parent
    assert "site-packages" in home.parts, f"not the installed package: {home}"
    command = [str(Path(sys.executable).with_name("kvquant")), "--help"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    if sys.argv[1:] == ["library"]:
        return check_without_extras()
    save_tiny(Path("tiny"))
    Path("study.json").write_text(json.dumps(STUDY), encoding="utf-8")
    base = ["--study", "study.json", "--model", "tiny"]
    ours = ["--model-manifest", "model/manifest.json"]
    data = ["--data-manifest", "data/manifest.json"]
    cpu = ["--device", "cpu"]
    stats = "out/calib/tiny/stats.safetensors"
    quantizer = "out/models/tiny/nuq4/quantizer.json"
    verb("fetch-model", *base, "--out", "model/manifest.json")
    verb("fetch-data", "--study", "study.json", "--dataset", "essays", "--out", data[1])
    verb("calibrate", *base, *ours, *data, *cpu, "--out", stats)
    verb("quantize", *base, "--scheme", "nuq4", "--stats", stats, "--out", quantizer)
    check_generation(Path(ours[1]), Path(quantizer))
    check_library()
    check_window()
    verb("prompts", *base, *ours, "--task", "passkey", "--seeds", "0", "--out", "p.jsonl.gz")
    for scheme in STUDY["schemes"]:
        for task in STUDY["tasks"]:
            words = [*base, *ours, *cpu, "--scheme", scheme, "--task", task, "--seeds", "0"]
            words += ["--prompts", "p.jsonl.gz"] if task == "passkey" else data
            words += ["--quantizer", quantizer] if scheme == "nuq4" else []
            verb("evaluate", *words, "--out-dir", f"out/eval/tiny/{scheme}/{task}")
            record = read_record(f"out/eval/tiny/{scheme}/{task}/seed0/run.json", EvalRecord)
            assert record.samples >= 1
    names = ("kvquant", "torch", "transformers", "lm-eval", "numpy", "pandas", "pydantic")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), ": works")


if __name__ == "__main__":
    main()
