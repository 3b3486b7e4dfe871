"""Own files as a text with a test part, or as prompts; a refused line is named.

Also covers: fetch.prompt_rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.fetch.datasets import fetch_data
from kvquant.fetch.own_texts import own_text, split_at
from kvquant.fetch.prompt_rows import from_lines
from kvquant.fetch.text_overlap import calibrated_text, check_apart
from kvquant.fetch.texts import load_text
from kvquant.study.config import Study, parse_study
from kvquant.study.own_texts import OwnText


def prose(start: int, count: int) -> str:
    """Sentences of which none stands twice."""
    return "".join(f"Sentence {n} is about the number {n * n + 7}.\n" for n in range(count))[start:]


def study_of(*names: Path | str, **task: Any) -> Study:
    """A study that reads own files: prompts where `task` has options."""
    asked = {"suite": "prompts", "dataset": "mine", **task}
    read = {"suite": "perplexity", "dataset": "mine"}
    return parse_study(
        {
            "study": "own",
            "headline": "fp16",
            "models": {"tiny": {"source": "local", "path": "model"}},
            "datasets": {"mine": {"files": [str(name) for name in names]}},
            "schemes": {"fp16": {"kind": "fp16"}},
            "tasks": {"asked": asked if task else read},
        }
    )


def test_parts_of_own_files_are_apart(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + prose(0, 300), encoding="utf-8")
    second.write_text("Zweite Datei: " + prose(0, 500)[-4000:].upper(), encoding="utf-8")
    study = study_of(first, second)
    manifest = tmp_path / "out/manifest.json"
    facts = fetch_data("mine", manifest, None, study)
    assert facts["source"] == "own" and facts["origin"] == "a.txt, b.txt"
    own = study.datasets["mine"]
    parts = [load_text(manifest, part, "mine", own) for part in ("calibration", "test", "all")]
    assert parts[0] + parts[1] == parts[2]
    assert parts[2].startswith("Sentence 0") and "\n\nZweite Datei" in parts[2]
    assert 0.2 < len(parts[1]) / len(parts[2]) <= 0.25 and parts[0].endswith("\n")
    check_apart(calibrated_text(manifest), manifest)
    other = own.model_copy(update={"test_share": 0.5})
    with pytest.raises(UserError, match="was made of other files, or with another test_share"):
        load_text(manifest, "test", "mine", other)


@given(st.text(min_size=2), st.floats(0.01, 1))
def test_both_parts_hold_something(text: str, share: float) -> None:
    at = split_at(text, share)
    assert at == 0 if share == 1 else 0 < at < len(text)


def test_a_text_that_repeats_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 400) * 2)
    own = OwnText(files=[str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match=r"texts: \d+ % of the test part .*25 %"):
        own_text("texts", own)
    assert own_text("texts", own.model_copy(update={"test_share": 1}))[1] == 0


def test_an_edited_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(prose(0, 300))
    study = study_of(file)
    file.write_text(prose(0, 299))
    with pytest.raises(UserError, match=r"datasets.mine.files: .*a.txt was edited since this run"):
        fetch_data("mine", tmp_path / "out/manifest.json", None, study)
    with pytest.raises(UserError, match="unknown dataset 'mien': did you mean mine"):
        fetch_data("mien", tmp_path / "out/manifest.json", None, study)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "byte 0 is not UTF-8: save it as UTF-8"), (b" \n", "a.txt is empty")],
)
def test_files_that_hold_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        own_text("texts", OwnText(files=[str(tmp_path / "a.txt")]))


def asked(folder: Path, *lines: Any, **task: Any) -> str:
    """The data set that lines of a file give, objects as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "q.jsonl").write_text("\n".join(texts), encoding="utf-8")
    study = study_of(folder / "q.jsonl", **(task or {"samples": 1}))
    fetch_data("mine", folder / "out/manifest.json", None, study)
    return load_text(folder / "out/manifest.json", "all", "mine", study.datasets["mine"])


def test_rows_keep_their_place(tmp_path: Path) -> None:
    text = asked(
        tmp_path, {"prompt": "a\u2028", "answers": "x"}, "", {"prompt": "b", "answers": ["y", "z"]}
    )
    first, second = from_lines(text, "mine")
    assert (first.prompt, first.answers, first.line) == ("a\u2028", ("x",), 1)
    assert (second.answers, second.where) == (("y", "z"), f"{tmp_path / 'q.jsonl'}, line 3")
    with pytest.raises(UserError, match="mine: holds no prompts"):
        from_lines("{}\n", "mine")


GOOD = {"prompt": "a", "answers": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: expected an object"),
        ({"question": "b"}, "line 2: unknown field 'question'; known: prompt, answers"),
        ({"answers": "b"}, "line 2: the field 'prompt' must be a text"),
        ({"prompt": " ", "answers": "b"}, "line 2: the field 'prompt' must be a text"),
        ({"prompt": "b", "answers": 3}, "line 2: the field 'answers' must be a text, or a list"),
        ({"prompt": "b", "answers": [""]}, "line 2: the field 'answers' must be a text, or a list"),
        ({"prompt": "b"}, "line 2: has no 'answers', but .*line 1 has"),
        (GOOD, "line 2: is the prompt of .*q.jsonl, line 1, too"),
    ],
)
def test_refused_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"q.jsonl, {message}"):
        asked(tmp_path, GOOD, line)


def test_scoring_needs_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks.asked.scoring: 'f1' needs .*q.jsonl, line 1 has"):
        asked(tmp_path, {"prompt": "a"}, scoring="f1")
    assert asked(tmp_path, {"prompt": "a"}, scoring="agreement")
    with pytest.raises(UserError, match=r"q\.jsonl is empty"):
        asked(tmp_path, "", "")
