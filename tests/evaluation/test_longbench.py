"""LongBench: rules read from lm-eval, the cut in the middle, subsets, and bad data.

Also covers: evaluation.longbench_tasks, fetch.lm_eval_files, fetch.longbench_rows.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kvquant.errors import UserError
from kvquant.evaluation.longbench import as_tokens, choose, cut_middle, fit_prompt
from kvquant.evaluation.longbench_tasks import definition, first_line
from kvquant.fetch import datasets as fetch
from kvquant.fetch.datasets import fetch_data
from kvquant.fetch.lm_eval_files import task_files
from kvquant.fetch.longbench_rows import PACKAGE, read_rows
from kvquant.study.config import parse_study
from kvquant.study.tasks import LONGBENCH_TASKS, LongBenchTask
from tests.evaluation.asking import asker
from tests.support.models import tiny_tokenizer
from tests.support.text import TEXT, json_lines, longbench_row

PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
HERE = [
    name
    for name in LONGBENCH_TASKS
    if importlib.util.find_spec("rouge") or name in ("qasper", "triviaqa", "trec")
]


def measure(qm: Any, task: str, rows: list[dict[str, Any]], seed: int = 0, **more: Any) -> Any:
    settings: dict[str, Any] = {"length": 900, "max_new_tokens": 6, **more}
    spec = LongBenchTask(suite="longbench", task=task, **settings)
    return asker("lb", json_lines(rows))(qm, spec, seed)


def test_names_are_lm_evals_english_tasks() -> None:
    found = {r["task"] for r in task_files(PACKAGE) if isinstance(r.get("task"), str)}
    assert {f"longbench_{name}" for name in LONGBENCH_TASKS} <= found
    rest = {n for n in found if not n.endswith("_e")} - {f"longbench_{n}" for n in LONGBENCH_TASKS}
    chinese = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
    assert rest == {f"longbench_{name}" for name in chinese}


@pytest.mark.parametrize("name", HERE)
def test_rules_agree_with_the_official_record(name: str, data_dir: Path) -> None:
    record = json.loads((data_dir / "longbench" / "tasks.json").read_text())["tasks"][name]
    task = definition(name)
    assert task.max_new_tokens == record["max_new_tokens"]
    assert task.first_line == record["first_line_only"]
    assert task.chat == record["chat_template"] == (name not in PLAIN)
    # lm-eval's wording differs from the official one in blanks at seams and ends only.
    ours = task.template.replace("{{question}}", "{input}").replace("{{context}}", "{context}")
    assert ours.split() == record["prompt_template"].split()


def test_first_line_skips_leading_newlines() -> None:
    assert first_line("\n\nParis\nBerlin") == "Paris"
    assert first_line("") == "" and first_line("\n\n") == "" and first_line(" a ") == " a "


def test_the_middle_is_cut() -> None:
    tokenizer = tiny_tokenizer()
    text = " ".join(f"w{n}" for n in range(300))
    tokens = tokenizer(text).input_ids
    short, cut = cut_middle(tokenizer, text, 101)
    assert cut and short == tokenizer.decode(tokens[:50]) + tokenizer.decode(tokens[-50:])
    assert cut_middle(tokenizer, text, len(tokens)) == (text, False)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["qasper", "triviaqa"])
def test_only_some_prompts_are_a_turn_of_a_chat(name: str, chat: bool) -> None:
    tokenizer, task = tiny_tokenizer(chat), definition(name)
    asked = {**longbench_row(1, context=TEXT * 20), "question": "Which?"}
    tokens, cut = fit_prompt(tokenizer, task, asked, 300)
    text = tokenizer.decode(tokens)
    assert cut and 290 <= len(tokens) <= 300
    assert text.startswith("<|im_start|>user") == (chat and name == "qasper")
    with pytest.raises(UserError, match="too short"):
        fit_prompt(tokenizer, task, asked, len(as_tokens(tokenizer, "", task.chat)))


def test_seeds_choose_the_subset() -> None:
    drawn = [choose(50, 10, seed) for seed in range(5)]
    assert all(rows == sorted(set(rows)) and len(rows) == 10 for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) == 5
    assert choose(50, 10, 3) == drawn[3]
    assert choose(5, 0, 1) == choose(5, 9, 2) == [0, 1, 2, 3, 4]


def test_result_names_rows_and_subset(tiny: Any) -> None:
    rows = [longbench_row(n) for n in range(6)]
    result = measure(tiny, "triviaqa", rows, seed=1, samples=3)
    assert [r["row"] for r in result.rows] == choose(6, 3, 1)
    assert result.metrics["rows_available"] == 6 and result.metrics["rows_official"] == 200
    assert result.metrics["subset"] == 1.0 and result.protocol == "A"
    assert result.value == 100 * sum(r["score"] for r in result.rows) / 3
    for found in result.rows:
        assert found["answer"].lstrip("\n").count("\n") <= 1


def test_batch_size_changes_nothing(tiny_kivi: Any) -> None:
    rows = [longbench_row(n, context=TEXT * (1 + n)) for n in range(5)]
    one = measure(tiny_kivi, "qasper", rows, batch_size=1)
    for size in (2, 5):
        other = measure(tiny_kivi, "qasper", rows, batch_size=size)
        assert other.rows == one.rows and other.value == one.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, "'context' is missing"),
        ({"input": None}, "'input' is missing"),
        ({"answers": None}, "'answers' is missing"),
        ({"answers": []}, "at least one"),
        ({"answers": "yes"}, "not a list"),
        ({"context": 3}, "not a str"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    bad = {**longbench_row(1), **change}
    bad = {k: v for k, v in bad.items() if v is not None}
    with pytest.raises(UserError, match=rf"line 2.*{message}") as error:
        read_rows(json_lines([longbench_row(0), bad]), "qasper.jsonl")
    assert len(str(error.value).splitlines()) == 1
    folder = tmp_path / "longbench"
    folder.mkdir()
    (folder / "qasper.jsonl").write_text(json_lines([longbench_row(0), bad]))
    with pytest.raises(UserError, match=message):
        fetch_data("longbench-qasper", tmp_path / "out" / "manifest.json", str(tmp_path))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows"):
        read_rows("\n\n", "x")
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_rows("{", "x")
    with pytest.raises(UserError, match=r"holds no longbench/qasper\.jsonl"):
        fetch_data("longbench-qasper", tmp_path / "m.json", str(tmp_path))
    with pytest.raises(UserError, match="longbench-qasper"):
        fetch_data("longbench-qaspr", tmp_path / "m.json", str(tmp_path))


def test_unicode_line_ends_stay_in_a_row() -> None:
    rows = read_rows(
        json_lines([longbench_row(0, context="a\u2028b\u0085c"), longbench_row(1)]), "x"
    )
    assert len(rows) == 2 and rows[0]["context"] == "a\u2028b\u0085c"


def test_hub_rows_have_lm_evals_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(repo: str, config: str) -> list[dict[str, Any]]:
        asked.append((repo, config))
        changed = {**longbench_row(0), "question": "Which?"}
        del changed["input"]
        return [changed]

    monkeypatch.setattr(fetch, "_hub_rows", hub)
    facts = fetch_data("longbench-lcc", tmp_path / "manifest.json", None)
    assert asked == [("Xnhyacinth/LongBench", "lcc")]
    assert "subset, 1 of 500" in facts["origin"] and facts["source"] == "hub"
    assert read_rows((tmp_path / "text.txt").read_text(), "x")[0]["question"] == "Which?"


def test_a_typo_in_a_study_offers_the_nearest() -> None:
    raw: dict[str, Any] = {
        "study": "check",
        "models": {"tiny": {"source": "local", "path": "x"}},
        "schemes": {"fp16": {"kind": "fp16"}},
        "headline": "fp16",
        "tasks": {"lb": {"suite": "longbench", "task": "hotpot_qa"}},
    }
    with pytest.raises(UserError, match=r"tasks\.lb\.task: .*did you mean .*hotpotqa"):
        parse_study(raw)
    raw["tasks"] = {"r": {"suite": "ruler", "task": "niah_singel_1"}}
    with pytest.raises(UserError, match=r"tasks\.r\.task: .*did you mean .*niah_single_1"):
        parse_study(raw)
    with pytest.raises(UserError, match="hotpotqa"):
        definition("hotpot_qa")


def test_length_beyond_the_positions_is_refused(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"tasks\.lb\.length: 4096 .* 2048 positions"):
        measure(tiny, "qasper", [longbench_row(0)], length=4096)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "rouge" else real(name, *a)
    )
    with pytest.raises(UserError, match="needs the package 'rouge'"):
        definition("gov_report")
