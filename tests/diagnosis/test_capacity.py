"""`kvquant capacity`: the screen, the JSON, and one line for what cannot be.

Also covers: diagnosis.sizes, diagnosis.screen.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvquant.cli import main
from kvquant.diagnosis.screen import Screen
from kvquant.diagnosis.sizes import size_in_bytes
from kvquant.errors import UserError
from tests.diagnosis.conftest import SMALL

FEW = ["--scheme", "fp16", "nuq3-1pct", "hf-fp8"]


def test_json_and_screen_say_the_same(
    root: Path, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["capacity", "--model", str(configs / "7b"), "--memory", "24GB", "--prompt", "8192"]
    words += ["--batch", "2", *FEW]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["measured"], found["batch"]) == (1, False, 2)
    page = (root / "docs/cli.md").read_text(encoding="utf-8").split("## `capacity --json`")[1]
    assert all(f"`{key}`" in page for key in (*found, *found["model"], *found["schemes"][0]))
    left = found["memory_bytes"] - found["weight_bytes"] - found["reserve_bytes"]
    assert found["cache_bytes"] == left - found["activation_bytes"]
    fp16, nuq, hf = found["schemes"]
    assert fp16["over_fp16"] == 1.0 and 4.0 < nuq["over_fp16"] < 4.8
    assert fp16["tokens"] == found["cache_bytes"] // (2 * 2 * 32 * 32 * 128)
    assert hf["tokens"] is None and "kvquant bench" in hf["problem"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"{nuq['tokens']:,}" in shown and f"{nuq['longest_of_batch']:,}" in shown
    assert "hf-fp8: no formula" in shown and "This is a formula" in shown
    assert "\x1b" not in shown and all(line == line.rstrip() for line in shown.splitlines())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--memory", "12GB"], "--memory: 12.00 GB do not hold the weights in float16 (13.48 GB)"),
        (["--memory", "24"], "--memory: '24' is no size of memory; write 24GB or 24GiB"),
        (["--memory", "24GB", "--dtype", "float32"], "a smaller dtype"),
        (["--memory", "24GB", "--prompt", "0"], "--prompt: 0 is not between 1 and"),
        (["--memory", "24GB", "--prompt", "40000"], "--prompt: 40,000 exceeds the model's 32,768"),
        (["--memory", "9" * 400 + "GB"], "--memory: '99999999999999999999' is more than any"),
        (["--memory", "24GB", "--model", "/no\nsuch"], r"--model: /no\nsuch is no folder"),
        (["--memory", "24GB", "--batch", "0"], "--batch: 0 is not between 1 and"),
        (["--memory", "24GB", "--scheme", "kiwi"], "unknown scheme 'kiwi': did you mean kivi"),
        (["--memory", "24GB", "--reserve", "much"], "--reserve: 'much' is no size"),
    ],
)
def test_wrong_input_takes_one_line(
    words: list[str], told: str, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capacity", "--model", str(configs / "7b"), *words]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out


def test_a_refused_model_takes_one_line(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "--model", str(configs / "starcoder2"), "--memory", "24GB"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kvquant: error: model: attention 'Starcoder2Attention'")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("family", "options", "told"),
    [
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: 0 is not between 1 and 4,096"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers: 1,000,000 is not between"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings: 0 leaves no room"),
        ("mistral", {"sliding_window": 0}, "sliding_window: 0 tokens leave no earlier one"),
        ("mistral", {"sliding_window": 1}, "sliding_window: 1 tokens leave no earlier one"),
        (
            "llama",
            {"hidden_size": "wide"},
            "field 'hidden_size': TypeError: .* expected int, got s",
        ),
        ("a\x1b[31mb", {}, r"model type `a\\x1b\[31mb`"),
    ],
)
def test_a_configuration_that_cannot_be_takes_one_line(
    family: str, options: dict[str, Any], told: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SMALL, **options}))
    assert main(["capacity", "--model", str(tmp_path), "--memory", "24GB"]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said) and said.count("\n") == 1 and "\x1b" not in said


def test_prompts_are_no_longer_than_the_model_takes(configs: Path, capsys: Any) -> None:
    words = ["capacity", "--model", str(configs / "small"), "--memory", "4GB", *FEW, "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == 2048
    assert main(["capacity", "--model", str(configs / "7b"), *words[3:5], "--weights", "1MB",
                 *FEW, "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["prompt"] == 4096


def test_given_sizes_take_the_place_of_computed_ones(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["capacity", "--model", str(configs / "small"), "--memory", "1GiB", "--prompt", "64"]
    assert main([*words, "--weights", "100MB", "--reserve", "0.2GB", *FEW, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_bytes"] == 2**30 and found["weight_bytes"] == 100_000_000
    assert found["reserve_bytes"] == 200_000_000
    assert found["schemes"][0]["longest"] == 2048  # the model's limit


def test_sizes() -> None:
    assert size_in_bytes("24GB", "x") == size_in_bytes("24 gb", "x") == 24 * 10**9
    assert size_in_bytes("1.5GiB", "x") == 3 * 2**29 and size_in_bytes("80G", "x") == 80 * 10**9
    for wrong in ("", "GB", "-1GB", "1e3GB", "24XB"):
        with pytest.raises(UserError):
            size_in_bytes(wrong, "--memory")


def test_a_narrow_terminal_gets_whole_numbers_in_lines_that_it_wraps() -> None:
    """A cut number would be another one."""
    for width in (10, 30):
        out = io.StringIO()
        screen = Screen(Console(file=out, force_terminal=True, width=width, color_system=None))
        cells = ("a-scheme-of-ours", "15,389", "4,096*", "why\n-> not")
        screen.table(("scheme", "tokens", "longest", "because"), [cells], wide=("because",))
        assert "a-scheme-of-ours  15,389  4,096*   why -> not" in out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_whole_columns(width: int) -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=True, width=width, color_system=None))
    screen.table(
        ("state", "name", "found"),
        [("", "part", ""), ("ok", "a-name-that-is-long", "word " * 40), ("missing", "b", "c")],
        wide=("found",),
    )
    lines = out.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert "a-name-that-is-long" in out.getvalue() and len(lines) > 5
