"""Own files as data sets: hashes enter digests, edited files are refused or measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvquant.errors import UserError
from kvquant.study import digests
from kvquant.study.config import Study, digest, load_study, parse_study
from kvquant.study.own_texts import edited_since, is_read, refuse_edited

SHA = "0" * 64


def raw(**changed: Any) -> dict[str, Any]:
    """A study that reads own texts and asks own prompts."""
    study: dict[str, Any] = {
        "study": "own",
        "headline": "nuq3",
        "models": {"tiny": {"source": "local", "path": "model"}},
        "datasets": {
            "notes": {"files": ["a.txt", "b.txt"]},
            "asked": {"files": ["asked.jsonl"]},
        },
        "calibration": {"dataset": "notes"},
        "schemes": {"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3}},
        "tasks": {
            "ppl": {"suite": "perplexity", "dataset": "notes"},
            "essays": {"suite": "perplexity", "dataset": "essays"},
            "asked": {"suite": "prompts", "dataset": "asked"},
        },
        "throughput": {"workloads": {"p": {"prompt": 8}}},
        "energy": {"workloads": {"p": {"prompt": 8}}},
    }
    return study | changed


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the study's relative paths start, with its files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "asked.jsonl"):
        (tmp_path / name).write_text(name)
    return tmp_path


def every_digest(study: Study) -> dict[str, str]:
    found = {"calibration": digests.calibration_digest(study, "tiny")}
    for scheme in study.schemes:
        for task in study.tasks:
            found[f"{scheme} {task}"] = digests.eval_digest(study, "tiny", scheme, task, 0)
    found["prompts"] = digests.prompts_digest(study, "tiny", "asked")
    found["perf"] = digests.perf_digest(study, "tiny", "nuq3", "p")
    found["energy"] = digests.energy_digest(study, "tiny", "nuq3", "p")
    return found


def test_what_depends_on_an_edited_file_has_another_digest(here: Path) -> None:
    before = every_digest(parse_study(raw()))
    (here / "b.txt").write_text("edited")
    after = every_digest(parse_study(raw()))
    told = {name for name in before if before[name] != after[name]}
    calibrated = {"calibration", "nuq3 ppl", "nuq3 essays", "nuq3 asked", "perf", "energy"}
    assert told == calibrated | {"fp16 ppl"}
    (here / "asked.jsonl").write_text("edited")
    again = every_digest(parse_study(raw()))
    told = {name for name in before if again[name] != after[name]}
    assert told == {"prompts", "fp16 asked", "nuq3 asked"}


def test_what_files_are_called_changes_nothing(here: Path) -> None:
    before = every_digest(parse_study(raw()))
    (here / "b.txt").rename(here / "c.txt")
    moved = raw()
    moved["datasets"]["notes"]["files"] = ["a.txt", "c.txt"]
    assert every_digest(parse_study(moved)) == before
    moved["datasets"]["notes"]["test_share"] = 0.5
    assert every_digest(parse_study(moved))["calibration"] != before["calibration"]


def test_a_study_without_own_files_is_written_as_before(root: Path) -> None:
    study = load_study(root / "config/demo.yaml")
    assert "datasets" not in study.model_dump(mode="json")
    assert digest(study) == digest(parse_study(study.model_dump(mode="json")))


def test_edited_files_are_named(here: Path) -> None:
    study = parse_study(raw())
    file = here / "study.json"
    assert not list(edited_since(study.datasets, file))
    file.write_text(study.model_dump_json())
    assert parse_study(json.loads(file.read_text())) == study
    refuse_edited(study.datasets)
    assert not list(edited_since(study.datasets, file))
    (here / "b.txt").write_text("edited")
    (line,) = edited_since(parse_study(raw()).datasets, file)
    assert "datasets.notes: b.txt was edited since the last run" in line
    with pytest.raises(UserError, match=r"datasets.notes.sha256: b.txt was edited \(its sha256"):
        refuse_edited(study.datasets)
    # whatever else stands there tells nothing, and is refused by whoever reads it
    for text in ("", "[]", '{"datasets": 3}', '{"datasets": {"notes": {"files": ["a.txt"]}}}'):
        file.write_text(text)
        assert not list(edited_since(parse_study(raw()).datasets, file))


def test_a_manifest_is_of_the_files_as_they_are_now(here: Path) -> None:
    own, manifest = parse_study(raw(), "own.yaml").datasets["notes"], here / "manifest.json"
    assert not is_read(own, str(manifest))
    for found, current in (({"own": own.identity()}, True), ({"own": None}, False), ([], False)):
        manifest.write_text(json.dumps(found))
        assert is_read(own, str(manifest)) is current
    manifest.write_text(json.dumps({"own": own.identity() | {"test_share": 0.5}}))
    assert not is_read(own, str(manifest))


def test_a_missing_file_is_named(here: Path) -> None:
    (here / "b.txt").unlink()
    with pytest.raises(UserError, match=r"datasets.notes.files: no such file in .*: b.txt"):
        parse_study(raw())
    with pytest.raises(UserError, match="are not known yet"):
        every_digest(Study.model_validate(raw()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"datasets": {"notes": {"files": []}}}, "datasets.notes.files: List should have at least"),
        ({"datasets": {"notes": {"files": ["a", "a"]}}}, "datasets.notes: files: one is given twi"),
        ({"datasets": {"notes": {"files": ["a\n"]}}}, "files: must be names of files"),
        ({"datasets": {"notes": {"files": ["a"], "sha256": [SHA, SHA]}}}, "sha256: needs one per"),
        ({"datasets": {"notes": {"files": ["a"], "test_share": 0}}}, "test_share: Input should be"),
        (
            {"datasets": {"notes": {"files": ["a"], "test": 0.5}}},
            "datasets.notes.test: unknown key",
        ),
        (
            {"datasets": {"essays": {"files": ["a.txt"]}}},
            "'essays' is the name of a known data set",
        ),
        ({"datasets": {"My notes": {"files": ["a.txt"]}}}, "'My notes' must be kebab case"),
        ({"calibration": {"dataset": "note"}}, "unknown dataset 'note': did you mean notes"),
        ({"calibration": {"dataset": "asked"}}, "'asked' holds the prompts of a task"),
        (
            {"datasets": {**raw()["datasets"], "notes": {"files": ["a.txt"], "test_share": 1}}},
            "calibration.dataset: 'notes' is test text only",
        ),
        (
            {"tasks": {"ppl": {"suite": "prompts", "dataset": "essays"}}},
            "tasks.ppl.dataset: must be an entry of `datasets` with prompts",
        ),
        (
            {"tasks": {"p": {"suite": "prompts", "dataset": "asked", "length": 64}}},
            "tasks.p.max_new_tokens: leaves no room",
        ),
    ],
)
def test_mistakes_take_one_line(here: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_study(raw(**changed))
    assert message in str(error.value)
    assert all(line.startswith("config: ") for line in str(error.value).splitlines())
