"""`kvquant compare`: what it measures is what the library measures, on the screen as in the JSON.

Also covers: playground.compare_screen, playground.compared, playground.side_by_side.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import kvquant
from kvquant.cache.footprint import cache_nbytes
from kvquant.cli import main
from kvquant.diagnosis.screen import Screen
from kvquant.evaluation.perplexity import measure_windows
from kvquant.fetch import text_overlap
from kvquant.models.generation import greedy
from kvquant.models.loading import load_tokenizer
from kvquant.playground import side_by_side
from kvquant.playground.compare import Asked, prompt
from kvquant.playground.compare_screen import MARK, show
from kvquant.playground.compared import Compared, with_titles
from kvquant.playground.side_by_side import Side, agreeing
from kvquant.study.asked_schemes import asked_scheme
from tests.support.text import CORPUS

KIVI = "kind=kivi,bits=2,group=16,residual=16"
QUESTION = "What is green?"
FEW = ["--device", "cpu", "--max-new-tokens", "6", "--rounds", "2"]


def words(place: Path, *more: str) -> list[str]:
    return ["compare", "--model", str(place / "model"), *FEW, *more]


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    """What one comparison prints as JSON, of a prompt with a question."""
    given = ["--prompt-file", str(place / "prompt.txt"), "--question", QUESTION, "--json"]
    caches = ["--quantizer", str(place / "quantizer"), "--scheme", KIVI, "fp16", "hf-fp8"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        assert main(words(place, *given, *caches)) == 0
    return dict(json.loads(out.getvalue()))


def test_the_json_is_what_the_page_says(root: Path, found: dict[str, Any]) -> None:
    assert (found["schema"], found["status"], found["device"], found["dtype"]) == (
        *(1, 0, "cpu"),
        "float32",
    )
    page = (root / "docs/cli.md").read_text(encoding="utf-8").split("## `compare --json`")[1]
    row = found["caches"][0]
    assert all(f"`{key}`" in page for key in (*found, *row, *row["distance"], *row["prefill_ms"]))
    assert [row["kind"] for row in found["caches"]] == ["fp16", "allocated", "kivi", "hf-fp8"]
    assert (found["protocol"], found["chunk"]) == ("A", 256)  # hf-fp8 has no other


def test_the_numbers_are_those_of_the_library(place: Path, found: dict[str, Any]) -> None:
    prompt = (place / "prompt.txt").read_text().removesuffix("\n") + f"\n\n{QUESTION}"
    fp16, allocated, kivi, _ = found["caches"]
    for row, scheme, quantizer in (
        (kivi, asked_scheme(KIVI), None),
        (allocated, None, place / "quantizer"),
    ):
        qm = kvquant.load(place / "model", scheme, quantizer=quantizer, device="cpu")
        ids = qm.tokenizer(prompt).input_ids
        assert found["prompt_tokens"] == len(ids)
        answer = greedy(qm, [ids], 6, batch_size=1)
        assert row["answer"] == qm.tokenizer.decode(answer.tokens[0], skip_special_tokens=True)
        assert row["cache_bytes"] == answer.cache_bytes
        assert row["bits_per_element"] == 8 * answer.cache_bytes / answer.cache_elements
        windows = measure_windows(qm, torch.tensor([ids]), "A", 256, kl=True)
        assert windows.kl is not None and windows.agreed is not None
        assert row["distance"]["kl"] == pytest.approx(float(windows.kl.mean()), rel=1e-4, abs=1e-7)
        assert row["distance"]["top1"] == float(windows.agreed.double().mean())
    assert fp16["bits_per_element"] == 16.0
    assert fp16["distance"] | {"nll": 0} == {"nll": 0, "kl": 0.0, "kl_p99": 0.0, "top1": 1.0}
    assert fp16["same_answer"] and fp16["same_tokens"] == fp16["answer_tokens"]
    for row in found["caches"]:
        assert row["prefill_ms"]["n"] == row["decode_ms_per_token"]["n"] == 2
        assert 0 < row["prefill_ms"]["p10"] <= row["prefill_ms"]["median"]


def test_8_bit_attention_is_compared_with_16_bit_attention(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the option, which leaves the fp16 cache of the comparison as it is, and by schemes."""
    (place / "long.txt").write_text("The grass is green, and the sky is blue. " * 20)
    given = ["--prompt-file", str(place / "long.txt"), "--json", "--prompt-attention", "8-bit"]
    caches = ["--quantizer", str(place / "quantizer"), "--scheme", "fp16"]
    capsys.readouterr()
    assert main(words(place, *given, *caches)) == 0
    plain, allocated, fp16 = json.loads(capsys.readouterr().out)["caches"]
    found = [row["prompt_attention"] for row in (plain, allocated, fp16)]
    assert found == ["16-bit", "8-bit", "8-bit"]
    assert fp16["title"] == "16-bit cache, 8-bit attention"
    assert plain["distance"]["kl"] == 0 < fp16["distance"]["kl"] < allocated["distance"]["kl"]
    assert fp16["cache_bytes"] == plain["cache_bytes"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_whole_lines(width: int, found: dict[str, Any]) -> None:
    out = io.StringIO()
    show(found, Screen(Console(file=out, force_terminal=True, width=width, color_system=None)))
    shown = out.getvalue()
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    assert "16-bit cache" in shown and "KIVI 2 bits" in shown and "FP8, one scale" in shown
    assert "On a CPU they are times of PyTorch code" in " ".join(shown.split())


def test_answers_are_marked_where_they_differ(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base, row = found["caches"][0], found["caches"][2]
    answers = [
        base | {"answer": "one two three", "same_answer": True},
        row | {"answer": "one two four", "same_answer": False, "same_tokens": 2},
        found["caches"][3] | {"answer": "one two three", "same_answer": True},
    ]
    show(found | {"caches": answers}, Screen())
    said = capsys.readouterr().out
    assert f"\n  one two three\nKIVI 2 bits (6 tokens, from {MARK} on not fp16's)\n" in said
    assert f"\n  one two {MARK}four\n" in said
    assert said.endswith("FP8, one scale: the same answer\n")
    assert "\x1b" not in said and all(line == line.rstrip() for line in said.splitlines())


def test_a_text_is_read_and_not_answered(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[str] = []  # short texts have no fingerprints

    def share(calibrated: object, text: str) -> float:
        read.append(text)
        return 0.25

    monkeypatch.setattr(text_overlap, "shared_share", share)
    given = ["--text", str(place / "corpus.txt"), "--tokens", "150", "--scheme", "nuq3-1pct"]
    few = ["--calibrate-on", str(place / "corpus.txt"), "--windows", "1", "--window", "96"]
    assert main(words(place, *given, *few, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == 150
    assert (found["protocol"], found["chunk"]) == ("B", None)
    fp16, nuq = found["caches"]
    assert nuq["calibrated_here"] and nuq["calibration_overlap"] == 0.25
    assert CORPUS.startswith(read[0]) and 200 < len(read[0]) < 400
    assert nuq["answer"] is fp16["answer"] is nuq["same_tokens"] is None
    assert nuq["distance"]["kl"] > 0 and nuq["decode_ms_per_token"]["median"] > 0
    assert fp16["calibration_overlap"] is None
    show(found, Screen())
    said = capsys.readouterr().out
    assert "25 % of this text is in the texts that it was calibrated on" in said
    assert "same" not in said.splitlines()[1]


@pytest.mark.parametrize("stage", ["greedy", "PromptRun", "measure_windows"])
def test_a_cache_that_fails_is_a_row(
    stage: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = getattr(side_by_side, stage)

    def failing(qm: Any, *args: Any, **given: Any) -> Any:
        if qm.scheme.kind == "fp8":
            raise torch.cuda.OutOfMemoryError("no room")
        return real(qm, *args, **given)

    monkeypatch.setattr(side_by_side, stage, failing)
    given = ["--prompt-file", str(place / "prompt.txt"), "--scheme", "fp8", KIVI]
    assert main(words(place, *given)) == 1
    said = capsys.readouterr().out
    assert "FP8: out of memory" in said and "KIVI 2 bits" in said
    (row,) = (line for line in said.splitlines() if line.startswith("KIVI 2 bits  "))
    assert "-" not in row.split("KIVI 2 bits")[1]


def test_of_a_file_the_first_tokens_are_read(place: Path) -> None:
    tokenizer, _ = load_tokenizer(place / "model")
    of_text = Asked(place / "a", "--text", CORPUS, None, None, False)
    assert len(prompt(tokenizer, of_text, 4000)[1]) == 1024
    assert len(prompt(tokenizer, of_text, 500)[1]) == 500  # as many as fit
    of_prompt = Asked(place / "a", "--prompt-file", CORPUS, 9, "Why?", True)
    text, ids = prompt(tokenizer, of_prompt, 500)
    read = tokenizer.decode(tokenizer(CORPUS).input_ids[:9])
    assert text == f"{read}\n\nWhy?"
    assert tokenizer.decode(ids) == (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def test_names_for_readers_are_different() -> None:
    caches = [Compared("a", asked_scheme("kivi-2")), Compared("fp8", asked_scheme("fp8"))]
    caches.append(Compared("b", asked_scheme("kivi-2")))
    titles = [cache.title for cache in with_titles(caches)]
    assert titles == ["KIVI 2 bits (a)", "FP8", "KIVI 2 bits (b)"]


def test_leading_elements_that_agree() -> None:
    assert agreeing([1, 2, 3], [1, 2, 4]) == 2 and agreeing([1, 2], [1, 2, 4]) == 2
    assert agreeing([], [1]) == 0 and agreeing("one", "once") == 2


def test_a_side_stops_at_its_first_problem() -> None:
    calls: list[int] = []
    side = Side(Compared("fp8", asked_scheme("fp8")))
    side.attempt(lambda: calls.append(1))

    def fails() -> None:
        raise kvquant.UserError("logits: NaN")

    side.attempt(fails)
    side.attempt(lambda: calls.append(2))
    assert (calls, side.problem) == ([1], "logits: NaN")
    assert side.times([1.0]) is None


PROMPT = ["--prompt-file", "prompt.txt"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "--prompt-file: is missing; give a prompt file to answer, or --text"),
        ([*PROMPT, "--text", "corpus.txt"], "--prompt-file: --text is given, too; leave one"),
        (["--text", "corpus.txt", "--question", "Why?"], "--question: a text is not answered"),
        (["--text", "corpus.txt", "--chat"], "--chat: a text is not answered"),
        (["--text", "nowhere.txt"], "--text: no such file: nowhere.txt"),
        ([*PROMPT, "--rounds", "0"], "--rounds: 0 is less than 1"),
        ([*PROMPT, "--tokens", "1"], "--tokens: 1 is less than 2"),
        ([*PROMPT, "--scheme", "nuq3-1pct"], "'nuq3-1pct' needs calibration; give --calibrate-on"),
        ([*PROMPT, "--calibrate-on", "corpus.txt"], "--calibrate-on: no --scheme here needs"),
        ([*PROMPT, "--windows", "3"], "--windows: no --scheme here needs calibration"),
        ([*PROMPT, "--scheme", "nuq", "--calibrate-on", "no.txt"], "no such file: no.txt"),
        ([*PROMPT, "--scheme", "fp16"], "--scheme: fp16 is what others are compared with"),
        ([*PROMPT, "--scheme", "kivy-2"], "unknown scheme 'kivy-2': did you mean kivi-2"),
        ([*PROMPT, "--quantizer", "no/where/it/is"], "no/where/it/is is no folder"),
        ([*PROMPT, "--max-new-tokens", "9000"], "--max-new-tokens: 9,000 leaves the prompt"),
        ([*PROMPT, "--scheme", "nuq", "--calibrate-on", "."], "--calibrate-on: .: a folder"),
        (["--prompt-file", "corpus.txt"], "has positions for 506; read fewer by --tokens 442"),
    ],
)
def test_what_cannot_be_takes_one_line(
    more: list[str],
    told: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    assert main(words(place, *more)) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out


def test_a_quantizer_of_other_weights_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(place / "model")
    other.model.norm.weight.data *= 1.0001
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path)
    capsys.readouterr()
    given = ["--prompt-file", str(place / "prompt.txt"), "--quantizer", str(place / "quantizer")]
    assert main(["compare", "--model", str(tmp_path), *FEW, *given]) == 2
    assert "was built for model 'model' (weights" in capsys.readouterr().err


def test_another_models_tokenizer_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(place / "model")
    other.resize_token_embeddings(97)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path)
    capsys.readouterr()
    given = ["--prompt-file", str(place / "prompt.txt"), "--scheme", "fp8"]
    assert main(["compare", "--model", str(tmp_path), *FEW, *given]) == 2
    assert "tokenizer: gives the id" in capsys.readouterr().err


def test_allocated_codes_have_rotated_weights_of_their_own(place: Path) -> None:
    """As kvquant.load gives them; others keep the weights of the files."""
    import argparse

    from kvquant.models.value_rotation import values_rotated
    from kvquant.playground.compared import load_compared

    args = argparse.Namespace(
        model=str(place / "model"),
        quantizer=[str(place / "quantizer")],
        device="cpu",
        prompt_attention=None,
    )
    fp16, allocated, kivi = load_compared(args, {KIVI: asked_scheme(KIVI)})
    assert fp16.qm.model is kivi.qm.model is not allocated.qm.model
    assert values_rotated(allocated.qm.model) and not values_rotated(fp16.qm.model)
    assert cache_nbytes(fp16.qm.new_cache()) == 0
