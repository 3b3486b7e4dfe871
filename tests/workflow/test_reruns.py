"""What a change of the study measures again, on a DAG that ran to its end with stub verbs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from kvquant.analysis.report import whole
from kvquant.study.config import load_study
from kvquant.study.grid import place_in_line
from tests.workflow.stubbed import Run, stubbed

pytestmark = pytest.mark.slow
MEASURED = {"prompts", "evaluate", "throughput", "energy", "calibrate", "quantize", "fetch-model"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the study runs."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def run(root: Path, work: Path) -> Run:
    """Runs Snakemake on the finished smoke study; keyword `changes` edits the study's text."""
    call = stubbed(root, work)
    done = call("--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    return call


def mtime(file: Path) -> int:
    """When a file was written, in nanoseconds."""
    return file.stat().st_mtime_ns


def planned(done: subprocess.CompletedProcess[str]) -> list[tuple[str, dict[str, str]]]:
    """(verb, options) of every job of a dry run, from the commands that it prints."""
    assert done.returncode == 0, done.stderr[-3000:]
    commands = re.findall(r"python -m kvquant (\S+) (.*)", done.stdout + done.stderr)
    return [(verb, dict(re.findall(r"--(\S+) (\S+)", rest))) for verb, rest in commands]


def test_second_run_has_nothing_to_do(run: Run) -> None:
    done = run("-n", "-p")
    assert "Nothing to be done" in done.stdout + done.stderr


@pytest.mark.fault(
    "workflow",
    "report.html cut short or deleted, all else finished",
    "the next run makes the report, and nothing else",
)
@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_a_report_that_is_not_whole_is_made_again(run: Run, work: Path, damage: str) -> None:
    report = work / "results/smoke/report.html"
    assert whole(report)
    size = report.stat().st_size
    if damage == "cut":
        os.truncate(report, size // 2)
    else:
        report.unlink()
    assert [verb for verb, _ in planned(run("-n", "-p"))] == ["report"]
    done = run("--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert whole(report) and abs(report.stat().st_size - size) < size / 10
    assert not list(report.parent.glob("*.part.html"))
    done = run("-n")
    assert "Nothing to be done" in done.stdout + done.stderr


def test_a_changed_figure_is_shown_by_a_new_report(run: Run, work: Path) -> None:
    figure = work / "results/smoke/paper/figures/pareto.pdf"
    text, written = figure.read_text(), mtime(figure)
    figure.write_text("another")
    try:
        assert [verb for verb, _ in planned(run("-n", "-p"))] == ["report"]
    finally:
        figure.write_text(text)
        os.utime(figure, ns=(written, written))


def test_evaluations_go_task_by_task(root: Path, run: Run, work: Path) -> None:
    study = load_study(root / "config/smoke.yaml")
    made = sorted(work.glob("results/smoke/eval/*/*/*/seed0/run.json"), key=mtime)
    places = [place_in_line(study, *file.parts[-5:-2]) for file in made]
    assert sorted(places) == list(range(12))
    # Two run at a time and calibrated schemes wait for their quantizers, so that neighbours may
    # change places; a scheme's first task is done before its last all the same.
    count = len(study.schemes)
    for scheme in range(count):
        mine = [place for place in places if place % count == scheme]
        assert mine.index(scheme) < mine.index(12 - count + scheme), places


def test_copied_inputs_measure_nothing_again(run: Run, work: Path) -> None:
    folders = [work / name for name in ("resources", "results/smoke/calib", "results/smoke/models")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert len(files) >= 8 and sum(file.suffix == ".gz" for file in files) == 2
    for file in files:  # a copy has the time of copying
        os.utime(file)
    kept = (work / ".snakemake").rename(work / ".elsewhere")
    try:
        done = run("-n")
        assert "Nothing to be done" in done.stdout + done.stderr
    finally:
        shutil.rmtree(work / ".snakemake")
        kept.rename(work / ".snakemake")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # another codebook: this quantizer and what was measured with it
        (
            [("outliers: 0.01, block_size: 32", "outliers: 0.01, block_size: 64")],
            {"quantize": 1, "evaluate": 3, "throughput": 1, "energy": 1},
        ),
        # a peer's setting, and how speed is timed
        (
            [("residual: 32", "residual: 64"), ("max_seconds: 5", "max_seconds: 6")],
            {"evaluate": 3, "throughput": 1},
        ),
        # a task: its prompts, and what answers them
        (
            [("length: 256,", "length: 300,")],
            {"prompts": 1, "evaluate": 4},
        ),
        # how tests judge, and a job's time limit: nothing is measured again
        (
            [
                ("absolute: 0.5", "absolute: 0.4"),
                ("batch_size: 1}", "batch_size: 1, minutes: 3}"),
            ],
            {},
        ),
    ],
)
def test_a_change_measures_its_dependents_only(
    run: Run,
    changes: list[tuple[str, str]],
    expected: dict[str, int],
) -> None:
    jobs = planned(run("-n", "-p", changes=changes))
    assert Counter(verb for verb, _ in jobs if verb in MEASURED) == expected
    if "quantize" in expected:
        assert {o["scheme"] for verb, o in jobs if verb in MEASURED} == {"nuq3-1pct"}


def test_another_calibration_leaves_uncalibrated_schemes_alone(
    run: Run,
) -> None:
    jobs = planned(run("-n", "-p", changes=[("windows: 4", "windows: 5")]))
    evaluated = {w["scheme"] for rule, w in jobs if rule == "evaluate"}
    assert evaluated == {"nuq3-1pct", "nuq2-1pct"}
    assert "fetch-model" not in {rule for rule, _ in jobs}


@pytest.mark.parametrize(
    ("name", "options"),
    [("cq-4c8b", "{kind: cq}"), ("nuq3-after-rope", "{kind: nuq, bits: 3, keys: after-rope}")],
)
def test_a_scheme_that_needs_more_statistics_calibrates_again_for_itself(
    name: str, options: str, run: Run
) -> None:
    """Statistics of the same digest lack whole tokens, or keys after RoPE; all else stays."""
    line = "  kivi-2: {kind: kivi"
    jobs = planned(run("-n", "-p", changes=[(line, f"  {name}: {options}\n{line}")]))
    chosen = [(verb, o.get("scheme")) for verb, o in jobs if verb in MEASURED]
    assert Counter(chosen) == {
        ("calibrate", None): 1, ("quantize", name): 1, ("evaluate", name): 3,
    }  # fmt: skip


def test_another_model_is_fetched_and_measured(
    run: Run,
) -> None:
    jobs = planned(run("-n", "-p", changes=[("    sha256: bcc8", "    sha256: 1cc8")]))
    verbs = Counter(verb for verb, _ in jobs if verb in MEASURED)
    assert verbs["fetch-model"] == verbs["calibrate"] == 1 and verbs["evaluate"] == 12
    assert verbs["prompts"] == 2  # its tokens may be others


def test_prompts_that_were_carried_are_not_made_again(run: Run, work: Path) -> None:
    os.utime(work / "resources/models/smollm2-135m/manifest.json")  # as if made here, later
    texts = list(work.glob("resources/data/*/manifest.json"))
    lost = [file.rename(file.with_suffix(".lost")) for file in texts]
    results = (work / "results/smoke/eval").rename(work / "results/smoke/lost")
    try:
        folder = "results/smoke/eval/smollm2-135m"
        tasks = ("passkey-256", "ruler-niah-single-1")
        targets = [f"{folder}/{s}/{t}/seed0/run.json" for s in ("fp16", "kivi-2") for t in tasks]
        jobs = planned(run("-n", "-p", "--", *targets))
        assert Counter(verb for verb, _ in jobs) == {"evaluate": 4}
        assert all(f"/{o['task']}/" in o["prompts"] for _, o in jobs)
    finally:
        results.rename(work / "results/smoke/eval")
        for file in lost:
            file.rename(file.with_suffix(".json"))


def test_one_artifact_asks_for_no_other(
    run: Run,
) -> None:
    target = "results/smoke/paper/figures/pareto.pdf"
    jobs = planned(run("-n", "-p", "--forcerun", "plot", "--", target))
    assert [verb for verb, _ in jobs] == ["plot"]


def test_a_lost_result_is_measured_again_when_its_stage_is_asked_for(run: Run, work: Path) -> None:
    record = work / "results/smoke/eval/smollm2-135m/fp16/ppl-b/seed0/run.json"
    lost = record.rename(record.with_suffix(".lost"))
    try:
        jobs = planned(run("-n", "-p", "accuracy"))
        assert [(verb, o["scheme"], o["task"]) for verb, o in jobs] == [
            ("evaluate", "fp16", "ppl-b")
        ]
    finally:
        lost.rename(record)
