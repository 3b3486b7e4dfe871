"""The verb prompts: the same file for the same specification, and no file for another one.

Also covers: evaluation.generated, evaluation.prompt_file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.evaluation.prompt_file import PromptFile, write_prompts
from kvquant.evaluation.prompts import make_prompts
from kvquant.evaluation.run import evaluate
from kvquant.fetch.model import fetch_model
from kvquant.study import digests
from kvquant.study.config import Study, parse_study
from kvquant.study.digests import eval_digest, prompts_digest, prompts_name
from kvquant.study.models import ModelSpec
from kvquant.study.records import EvalRecord, read_record
from tests.evaluation.asking import passkey_study
from tests.support.models import save_tiny
from tests.support.text import ESSAYS, json_lines, longbench_row

RULER = {"suite": "ruler", "task": "niah_single_1", "length": 1600, "samples": 2}
LONGBENCH = {"suite": "longbench", "task": "trec", "length": 900, "samples": 2}


def put_text(folder: Path, name: str, text: str) -> Path:
    """A text as fetch-data leaves it; returns its manifest."""
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    facts = {"dataset": name, "source": "test", "characters": len(text), "test_from": 0}
    facts |= {"sha256": hashlib.sha256(text.encode()).hexdigest(), "file": "text.txt"}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder / "manifest.json"


@pytest.fixture
def raw(tiny_dir: Path) -> dict[str, Any]:
    found = passkey_study(tiny_dir)
    found["tasks"] |= {"ruler": RULER, "longbench": LONGBENCH}
    return found


@pytest.fixture
def study(raw: dict[str, Any]) -> Study:
    return parse_study(raw)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Manifests of the tasks' texts."""
    folder = tmp_path_factory.mktemp("texts")
    rows = json_lines([longbench_row(n, all_classes=["word", "none"]) for n in range(5)])
    return {
        "ruler": put_text(folder / "essays", "essays", ESSAYS),
        "longbench": put_text(folder / "trec", "longbench-trec", rows),
    }


def content(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the prompts."""
    head, *rest = gzip.decompress(file.read_bytes()).decode().rstrip("\n").split("\n")
    return json.loads(head), [json.loads(line) for line in rest]


@pytest.mark.parametrize("task", ["passkey", "ruler", "longbench"])
def test_equal_specifications_give_equal_bytes_and_seeds_stay_as_they_are(
    study: Study,
    manifest: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    task: str,
) -> None:
    def make(name: str, seeds: list[int]) -> Path:
        data = texts.get(task)
        file = tmp_path / name
        make_prompts(
            study, "tiny", task, seeds, model_manifest=manifest, data_manifest=data, out=file
        )
        return file

    first, again, grown = make("a", [0, 2]), make("b", [2, 0]), make("c", [2, 1, 0, 3])
    assert first.read_bytes() == again.read_bytes()
    (head, rows), (more, all_rows) = content(first), content(grown)
    assert [entry["seed"] for entry in more["seeds"]] == [0, 1, 2, 3]
    assert [entry for entry in more["seeds"] if entry["seed"] in (0, 2)] == head["seeds"]
    assert [r for r in all_rows if r["seed"] in (0, 2)] == rows and len(rows) == 4
    assert rows[0]["tokens"] != rows[2]["tokens"]
    digest = prompts_digest(study, "tiny", task)
    assert head["spec_digest"] == digest and (head["data_sha256"] is None) == (task == "passkey")
    ours, theirs = (PromptFile(f, digest, [2]).read([2]) for f in (first, grown))
    assert ours == theirs


def test_the_name_holds_what_prompts_depend_on(raw: dict[str, Any]) -> None:
    def name(**changes: Any) -> str:
        tasks = {**raw["tasks"], "passkey": {**raw["tasks"]["passkey"], **changes}}
        return prompts_name(parse_study({**raw, "tasks": tasks}), "tiny", "passkey")

    assert name(minutes=7) == name(batch_size=1) == name()
    assert len({name(), name(length=201), name(samples=3)}) == 3
    for more in ({"seeds": [0]}, {"models": {"tiny": {"source": "local", "path": "other"}}}):
        assert prompts_name(parse_study({**raw, **more}), "tiny", "passkey") != name()
    schemes = {"fp16": {"kind": "fp16"}, "kivi-4": {"kind": "kivi", "bits": 4}}
    assert prompts_name(parse_study({**raw, "schemes": schemes}), "tiny", "passkey") == name()


def test_another_version_of_prompts_is_another_result(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> dict[str, str]:
        return {task: eval_digest(study, "tiny", "fp16", task, 0) for task in study.tasks}

    before, name = found(), prompts_name(study, "tiny", "passkey")
    monkeypatch.setitem(digests.VERSIONS, "prompts", 99)
    after = found()
    assert {task for task in before if before[task] == after[task]} == {"ppl"}
    assert prompts_name(study, "tiny", "passkey") != name


def prepare(study: Study, model_manifest: Path, out: Path, seeds: list[int]) -> Path:
    make_prompts(study, "tiny", "passkey", seeds, model_manifest=model_manifest, out=out)
    return out


def measure(study: Study, model_manifest: Path, prompts: Path, out: Path, **more: Any) -> Any:
    files = {"model_manifest": model_manifest, "prompts": prompts, "out_dir": out, **more}
    return evaluate(study, "tiny", "fp16", "passkey", [0], device="cpu", **files)


def test_prompts_of_another_specification_are_refused(
    raw: dict[str, Any],
    manifest: Path,
    tmp_path: Path,
) -> None:
    other = json.loads(json.dumps(raw))
    other["tasks"]["passkey"]["length"] = 210
    file = prepare(parse_study(other), manifest, tmp_path / "p", [0])
    with pytest.raises(UserError, match=r"another specification \(digest \w+, expected \w+\)"):
        measure(parse_study(raw), manifest, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_of_another_tokenizer_are_refused(
    study: Study,
    manifest: Path,
    tiny_dir: Path,
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path / "model")
    spec = ModelSpec(source="local", path=str(folder))
    first, changed = tmp_path / "first.json", tmp_path / "changed.json"
    fetch_model("tiny", spec, first)
    with pytest.raises(UserError, match=r"another entry than the study's models\.tiny"):
        prepare(study, first, tmp_path / "p", [0])
    study = study.model_copy(update={"models": {"tiny": spec}})
    prompts = prepare(study, first, tmp_path / "p", [0])
    file = folder / "tokenizer.json"
    inner = json.loads(file.read_text())
    inner["model"]["merges"] = inner["model"]["merges"][:20]
    file.write_text(json.dumps(inner))
    fetch_model("tiny", spec, changed)
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        measure(study, changed, prompts, tmp_path / "out")


@pytest.mark.fault(
    "records",
    "a file of prompts cut, damaged or with an edited header",
    "refused: delete it by name",
)
def test_damage_is_told(
    study: Study,
    manifest: Path,
    tmp_path: Path,
) -> None:
    file = prepare(study, manifest, tmp_path / "p", [0, 1])
    raw, plain = file.read_bytes(), gzip.decompress(file.read_bytes())
    prompts = plain.rindex(b'"seed":1')
    for damaged in (
        raw[: len(raw) // 2],
        b"",
        b"no gzip",
        gzip.compress(plain.replace(b'"tokens":[', b'"tokens":[9,')),
        gzip.compress(plain[:prompts]),
        gzip.compress(plain + plain.splitlines(keepends=True)[-1]),
        gzip.compress(plain.replace(b'"max_new_tokens":10', b'"max_new_tokens":1')),
        gzip.compress(plain.replace(b'"seed":1', b'"seed":2', 1)),
        raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:],  # gzip's own sum
        raw[:-1] + b"\xff",  # the length
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged: delete it by name"):
            evaluate(
                study,
                "tiny",
                "fp16",
                "passkey",
                [0, 1],
                model_manifest=manifest,
                prompts=file,
                out_dir=tmp_path / "out",
                device="cpu",
            )
        assert not list(tmp_path.glob("out/seed1/run.json"))


def test_answers_to_other_prompts_are_not_taken(
    study: Study,
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, out, resume = tmp_path / "p", tmp_path / "out", tmp_path / "resume"
    prepare(study, manifest, prompts, [0])
    measure(study, manifest, prompts, out, resume_dir=resume)
    record = read_record(out / "seed0/run.json", EvalRecord)
    digest = prompts_digest(study, "tiny", "passkey")
    assert record.prompts_sha256 == PromptFile(prompts, digest, [0]).sha256(0)
    # the same specification made from other data: what is there is not its result
    [asked] = PromptFile(prompts, digest, [0]).read([0])
    head, _ = content(prompts)
    prompts.unlink()
    asked.prompts[0].tokens[5] += 1
    facts = {name: head[name] for name in ("spec_digest", "spec", "data_sha256", "packages")}
    write_prompts(prompts, {0: asked}, **facts, probe=head["probe"])
    old = record.prompts_sha256
    with pytest.raises(UserError, match=rf"answers to other prompts \(sha256 {old}"):
        measure(study, manifest, prompts, out)
    [again] = measure(study, manifest, prompts, tmp_path / "again", resume_dir=resume)
    assert again.prompts_sha256 != old  # the kept seed was not taken
    assert "resume: not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "passky"], "unknown task 'passky': did you mean passkey"),
        (["--task", "ppl"], "--task: 'ppl' is of suite 'perplexity', which has no prompts"),
        (["--task", "long"], "tasks.long.length: 100000 tokens and 10 of answer, but the model"),
        (["--task", "ruler"], "--data-manifest: task 'ruler' reads 'essays'"),
        (["--model", "tinny"], "unknown model 'tinny': did you mean tiny"),
        (["--model-manifest", "none.json"], "--model-manifest: no such file"),
        (["--seeds", "1", "1"], "--seeds: must be distinct"),
    ],
)
def test_bad_input_is_one_line(
    raw: dict[str, Any],
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "study.json").write_text(json.dumps(raw))
    words = ["prompts", "--study", str(tmp_path / "study.json"), "--model", "tiny"]
    words += ["--task", "passkey", "--seeds", "0", "--model-manifest", str(manifest)]
    assert main([*words, "--out", str(tmp_path / "out" / "p"), *options]) == 2
    [told] = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("kvquant: error: ") and message in told
    assert not (tmp_path / "out").exists()
