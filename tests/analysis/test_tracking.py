"""Records as runs of the real Weights & Biases, offline: read back, never twice, never in results.

Also covers: analysis.run_facts, study.tracking.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvquant.analysis.problems import Problems
from kvquant.analysis.run_facts import numbers, runs
from kvquant.cli import main
from kvquant.study import digests
from kvquant.study.config import Study, load_study, parse_study
from tests.support.studies import DEVICE, study_of, write_study

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (extra `wandb`)"
)
TASK = {"ppl": {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": 3}}


def small(**changed: Any) -> Study:
    """A study of few records, one of every kind."""
    parts: dict[str, Any] = {"tasks": TASK, "seeds": [0], "tracking": {}}
    schemes = {"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3}}
    return study_of(**parts | {"schemes": schemes} | changed)


def track(study: Path, results: Path, out: Path, *more: str) -> int:
    words = ["--study", str(study), "--results", str(results), "--device-name", DEVICE]
    return main(["track", *words, "--out-dir", str(out), *more])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    write_study(small(), folder)
    return folder


def messages(file: Path) -> Iterator[bytes]:
    """The messages of an offline run, which is cut at blocks of 32 KiB like LevelDB's logs."""
    raw, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_back(file: Path) -> dict[str, Any]:
    """The facts of an offline run, by the tracker's own format."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"config": {}, "summary": {}}
    for message in messages(file):
        record: Any = wandb_internal_pb2.Record.FromString(message)
        if record.HasField("run"):
            for name in ("run_id", "project", "display_name"):
                found[name] = getattr(record.run, name)
            for item in record.run.config.update:
                found["config"][item.key] = json.loads(item.value_json)
        for item in record.summary.update:
            found["summary"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.wandb"))


@needs_wandb
def test_every_record_is_a_run_with_settings_and_numbers(results: Path, tmp_path: Path) -> None:
    before = sorted(results.rglob("*"))
    out = tmp_path / "logs"
    assert track(results / "study.json", results, out) == 0
    study = load_study(results / "study.json")
    expected = {run.id: run for run in runs(study, results, DEVICE, Problems())}
    found = {facts["run_id"]: facts for facts in map(read_back, files(out))}
    assert set(found) == set(expected) and len(files(out)) == len(expected)
    kinds = {run.kind for run in expected.values()}
    assert kinds == {"eval", "throughput", "energy", "append", "kernels"}
    for run_id, facts in found.items():
        assert facts["project"] == "kvquant-prefill"
        run = expected[run_id]
        assert facts["display_name"] == run.name
        assert run.config.items() <= facts["config"].items()
        assert run.summary.items() <= facts["summary"].items()
    (ours,) = (f for f in found.values() if f["display_name"] == "eval/tiny/nuq3/ppl/0")
    assert ours["config"]["scheme_spec"]["outliers"] == 0.01
    assert ours["config"]["calibration"]["window"] == study.calibration.window
    assert ours["summary"]["metrics/perplexity"] == ours["summary"]["value"]
    assert sorted(results.rglob("*")) == before  # the tracker wrote nothing there


@needs_wandb
def test_a_record_is_logged_once_and_again_when_it_changed(results: Path, tmp_path: Path) -> None:
    out, study = tmp_path / "logs", results / "study.json"
    (results / "append/gpu/rep1.json").unlink()
    assert track(study, results, out) == 2  # a record is missing
    assert track(study, results, out, "--present") == 0
    first = files(out)
    assert track(study, results, out, "--present") == 0
    assert files(out) == first
    (out / "runs.csv").unlink()  # as Snakemake does before it asks again
    seals = json.loads((out / "logged.json").read_text())
    one = next(iter(seals))
    (out / "logged.json").write_text(json.dumps(seals | {one: "another"}))
    assert track(study, results, out, "--present") == 0
    (again,) = set(files(out)) - set(first)
    assert again.name == f"run-{one}.wandb"  # the same run
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + len(seals)


@needs_wandb
def test_settings_of_the_user_do_not_apply(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("WANDB_DIR", str(results))
    (results / "append/gpu/rep1.json").unlink()
    for folder in ("eval", "perf", "energy", "kernels"):
        for file in sorted((results / folder).rglob("*.json")):
            file.unlink()
    assert track(results / "study.json", results, tmp_path / "logs", "--present") == 0
    (file,) = files(tmp_path)
    assert "offline-run" in file.parent.name and read_back(file)["project"] == "kvquant-prefill"
    assert os.environ["WANDB_MODE"] == "online"


def test_refusals(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    study = results / "study.json"
    assert track(study, results, results / "logs") == 2
    assert "--out-dir" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert track(study, results, tmp_path / "logs") == 2
    assert "install the extra `wandb`" in capsys.readouterr().err
    study.write_text(json.dumps(small(tracking=None).model_dump(mode="json")))
    assert track(study, results, tmp_path / "logs") == 2
    assert "add `tracking: {}`" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_ids_tell_records_apart_and_outlive_their_numbers(results: Path) -> None:
    study = load_study(results / "study.json")
    found = list(runs(study, results, DEVICE, Problems()))
    assert len({run.id for run in found}) == len(found)
    assert len({run.name for run in found}) == len(found)
    again = list(runs(study, results, DEVICE, Problems()))
    assert [(run.id, run.seal) for run in again] == [(run.id, run.seal) for run in found]
    # a run keeps its id when schemes or seeds are added
    raw = study.model_dump(mode="json") | {"seeds": [0, 1]}
    more = list(runs(parse_study(raw), results, DEVICE, Problems(present=True)))
    assert {run.id for run in more} == {run.id for run in found}


def test_tracking_changes_no_digest() -> None:
    assert digests.digest(small(tracking=None)) == digests.digest(
        parse_study(small().model_dump(mode="json", exclude={"tracking"}))
    )
    assert "tracking" not in small(tracking=None).model_dump()
    assert digests.append_digest(small()) == digests.append_digest(small(tracking=None))


def test_numbers_are_named_by_their_path() -> None:
    nested = {"a": {"b": 1, "c": None, "list": [1, 2]}, "points": [{"x": 2.5}], "s": "ok"}
    assert dict(numbers(nested)) == {"a/b": 1, "points/0/x": 2.5, "s": "ok"}
