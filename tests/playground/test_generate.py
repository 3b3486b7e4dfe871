"""`kvquant generate`: prompts from words, files and pipes; one line for what cannot be.

Also covers: playground.asked_cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import kvquant
from kvquant.cli import main
from kvquant.playground.generate import heading

KIVI = "kind=kivi,bits=4,group=16,residual=16"
FEW = ["--device", "cpu", "--max-new-tokens", "6"]


def test_all_ways_of_a_prompt_give_the_answer_of_the_library(
    place: Path, piped: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (place / "prompt.txt").read_text().removesuffix("\n")
    scheme = {"kind": "kivi", "bits": 4, "group": 16, "residual": 16}
    qm = kvquant.load(place / "model", scheme, device="cpu")
    (expected,) = kvquant.generate(qm, [text], 6)
    base = ["generate", "--model", str(place / "model"), "--scheme", KIVI, *FEW]
    piped(text + "\n")
    capsys.readouterr()
    for words in (["--prompt", text], ["--prompt-file", str(place / "prompt.txt")], []):
        assert main([*base, *words]) == 0
        said = capsys.readouterr()
        assert said.out == f"{expected}\n"
        assert said.err.startswith("1 prompt over the cache KIVI 4 bits in ")
        assert said.err.count("\n") == 1  # and no bar of a library


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    place: Path, tmp_path: Path, piped: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["generate", "--model", str(place / "model"), "--scheme", "fp16", *FEW]
    (tmp_path / "marked.txt").write_text("\ufeffThe sky\n")
    piped("\ufeffThe sky\n")
    said = set()
    for words in (["--prompt", "The sky"], ["--prompt-file", str(tmp_path / "marked.txt")], []):
        assert main([*base, *words]) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_prompts_may_attend_in_8_bits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "The grass is green. " * 30
    scheme = {"kind": "kivi", "bits": 4, "group": 16, "residual": 16, "prompt_attention": "8-bit"}
    (expected,) = kvquant.generate(kvquant.load(place / "model", scheme, device="cpu"), [text], 6)
    base = ["generate", "--model", str(place / "model"), *FEW, "--prompt", text]
    capsys.readouterr()
    for words in (
        ["--scheme", KIVI, "--prompt-attention", "8-bit"],
        ["--scheme", f"{KIVI},prompt_attention=8-bit"],
    ):
        assert main([*base, *words]) == 0
        said = capsys.readouterr()
        assert said.out == f"{expected}\n"
        assert "over the cache KIVI 4 bits, 8-bit attention in" in said.err


def test_several_prompts_are_one_ragged_batch(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["The sky", "The grass is green. " * 9]
    qm = kvquant.load(place / "model", quantizer=place / "quantizer", device="cpu")
    one, other = kvquant.generate(qm, prompts, 6, chat=True)
    words = ["generate", "--model", str(place / "model"), "--quantizer", str(place / "quantizer")]
    capsys.readouterr()
    assert main([*words, *FEW, "--chat", "--prompt", *prompts]) == 0
    said = capsys.readouterr()
    assert said.out == f"> The sky\n{one}\n\n> {heading(prompts[1])}\n{other}\n"
    assert said.err.startswith("2 prompts over the cache Allocated codes 3.4 bits")
    assert len(heading(prompts[1])) <= 60 and heading(prompts[1]).endswith("...")


def test_a_seed_repeats_what_is_sampled(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["generate", "--model", str(place / "model"), "--prompt", "The sky", *FEW]
    said = []
    for more in (["7"], ["7"], ["8"]):
        assert main([*base, "--scheme", "fp8", "--temperature", "5", "--seed", *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", "a", "--scheme", "allocated-3"], "--scheme: 'allocated-3' needs calibration"),
        (["--prompt", "a", "--scheme", "fp9"], "unknown scheme 'fp9': did you mean fp8"),
        (["--prompt", "a", "--scheme", "fp8", "--quantizer", "q"], "leave --scheme or it out"),
        (["--prompt", "a", "--prompt-file", "b"], "leave --prompt or --prompt-file out"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file: no such file: nowhere.txt"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: 0 is less than 1"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size: 0 is less than 1"),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p: 1.5 is not above 0 and at most 1"),
        (["--prompt", "a", "--top-k", "0"], "--top-k: 0 is less than 1"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: -1 is no temperature"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "4"], "leave --top-p and --top-k out"),
        ([], "--prompt: is missing, and standard input is empty"),
        (["--prompt", "a " * 600], "prompt 0: 601 tokens and 128 of answer"),
    ],
)
def test_what_cannot_be_takes_one_line(
    words: list[str],
    told: str,
    place: Path,
    piped: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    piped("")
    assert main(["generate", "--model", str(place / "model"), "--device", "cpu", *words]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out
