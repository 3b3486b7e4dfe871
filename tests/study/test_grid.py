"""The grid that is shown before a study starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvquant.cli import main
from kvquant.study.config import load_study
from kvquant.study.grid import (
    expected_gpu_hours,
    grid_lines,
    grid_rows,
    job_rows,
    one_job_per_seed,
    place_in_line,
    request,
    threads,
)
from tests.support.studies import study_of


def test_rows_count_what_the_study_lists(root: Path) -> None:
    study = load_study(root / "config/smoke.yaml")
    rows = {stage: (jobs, results) for stage, jobs, results, _ in grid_rows(study)}
    schemes, seeds = len(study.schemes), len(study.seeds)
    for task in study.tasks:
        assert rows[f"evaluate {task}"] == (schemes, schemes * seeds)
    assert rows["throughput"][0] == len(study.throughput_cells())
    assert rows["energy"][0] == len(study.energy_cells())
    assert rows["kernels"] == (len(study.kernel_cases()),) * 2


def test_a_job_of_all_tasks_is_counted_once(root: Path) -> None:
    study = load_study(root / "config/demo.yaml")
    assert study.evaluation.tasks_per_job == "all"
    first, *others = (row for row in grid_rows(study) if row[0].startswith("evaluate "))
    schemes, results = len(study.schemes), len(study.schemes) * len(study.seeds)
    assert first[1:3] == (schemes, results)
    assert [row[1:3] for row in others] == [(0, results)] * (len(study.tasks) - 1)
    assert dict((rule, jobs) for rule, jobs, _ in job_rows(study))["evaluate"] == schemes
    model, asked = next(iter(study.models)), study.tasks
    parts = [request(study, "evaluate", model, task).minutes for task in asked]
    assert request(study, "evaluate", model).minutes == sum(parts)
    places = [place_in_line(study, model, scheme) for scheme in study.schemes]
    assert places == list(range(schemes))


def test_statistics_with_whole_tokens_ask_for_the_memory_of_their_model() -> None:
    small, large = ({"source": "local", "path": "model", "mem_gb": gb} for gb in (1, 120))
    for schemes, wanted in (({}, 4_000), ({"cq-4c8b": {"kind": "cq"}}, 120_000)):
        plain: dict[str, Any] = {"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3}}
        study = study_of(models={"small": small, "large": large}, schemes=plain | schemes)
        assert request(study, "quantize", "large").mem_mb == wanted
        assert request(study, "quantize", "small").mem_mb == 4_000
        assert request(study, "prompts", "large").mem_mb == 4_000


def test_window_zero_is_told_as_all_positions(root: Path) -> None:
    study = load_study(root / "config/config.yaml")
    told = {stage: what for stage, _, _, what in grid_rows(study)}
    full = told["evaluate ppl-wikitext2-full-b"]
    assert full.startswith("8 windows of all the model's positions, protocol B")
    assert told["evaluate ppl-wikitext2-b"].startswith("all windows of 2048 tokens")
    assert not any(" 0 tokens" in line for line in grid_lines(study))


def test_evaluations_have_a_place_in_line(root: Path) -> None:
    study = load_study(root / "config/athena.yaml")
    names = [(m, s, t) for t in study.tasks for m in study.models for s in study.schemes]
    assert [place_in_line(study, *name) for name in names] == list(range(len(names)))


def test_hours_are_told_for_gpu_studies_only(root: Path) -> None:
    assert expected_gpu_hours(load_study(root / "config/demo.yaml")) == 0
    paper = load_study(root / "config/config.yaml")
    assert expected_gpu_hours(paper) > 1
    assert "GPU-hours" in grid_lines(paper)[-1]
    assert not any("GPU-hours" in x for x in grid_lines(load_study(root / "config/demo.yaml")))


def test_the_command_names_every_task_scheme_and_seed(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = root / "config/demo.yaml"
    assert main(["grid", "--study", str(file)]) == 0
    text, study = capsys.readouterr().out, load_study(file)
    for name in [*study.tasks, *study.schemes, *study.models, *map(str, study.seeds)]:
        assert name in text


def test_on_two_cores_calibration_leaves_one_to_evaluations(root: Path) -> None:
    demo, cluster = (load_study(root / f"config/{name}.yaml") for name in ("demo", "athena"))
    assert threads(demo, "calibrate", 2) + threads(demo, "evaluate", 2) == 2
    assert threads(demo, "throughput", 2) == 2  # alone
    assert threads(cluster, "calibrate", 128) == 8


def test_requests_of_the_cluster_study_fit_its_nodes_on_every_attempt(root: Path) -> None:
    study = load_study(root / "config/athena.yaml")
    for attempt in (1, 2, 3):
        for model in study.models:
            jobs = [request(study, "evaluate", model, task, attempt) for task in study.tasks]
            rules = ("calibrate", "throughput", "energy", "append_cost", "kernel_case")
            jobs += [request(study, rule, model, attempt=attempt) for rule in rules]
            for job in jobs:
                assert job.gpus in (1, 8)
                assert job.mem_mb <= 1_024_000
                assert job.minutes <= 48 * 60
    node = request(study, "throughput", next(iter(study.models)))
    assert (node.gpus, node.mem_mb) == (8, 1_024_000)
    model, task = next(iter(study.models)), next(iter(study.tasks))
    first, second = (request(study, "evaluate", model, task, n) for n in (1, 2))
    assert (second.mem_mb, second.minutes) == (2 * first.mem_mb, 2 * first.minutes)


def test_jobs_ask_for_the_gpus_of_their_model_or_case() -> None:
    spread = {"source": "local", "path": "model", "gpus": 2, "mem_gb": 30}
    small = {"shape": "tiny", "prompt": 64, "answer": 4, "schemes": ["fp16"]}
    cases = {"one": small, "two": small | {"gpus": 2}}
    changed: dict[str, Any] = {"models": {"tiny": spread}, "jobs": {"cases": cases, "minutes": 60}}
    study = study_of(gpus=1, **changed)
    for rule in ("calibrate", "evaluate", "throughput", "energy"):
        asked = request(study, rule, "tiny", "ppl" if rule == "evaluate" else None)
        assert (asked.gpus, asked.mem_mb) == (2, 30_000), rule
    assert request(study, "prompts", "tiny", "passkey").gpus == 0
    assert [request(study, "job_case", None, case=name).gpus for name in cases] == [1, 2]
    hours = {rule: hours for rule, _, hours in job_rows(study)}
    assert hours["job_case"] == 3.0
    shared = small | {"shape": "tiny-gqa", "gpus": 8, "split": "heads"}  # eight processes
    asked = request(
        study_of(gpus=1, jobs={"cases": {"eight": shared}}),
        "job_case",
        None,
        attempt=2,
        case="eight",
    )
    assert (asked.gpus, asked.mem_mb) == (8, 8 * 16_000)
    node = study_of(gpus=8, **changed)  # a timed job has a node alone
    assert request(node, "throughput", "tiny").gpus == 8
    assert request(node, "job_case", None, case="two").gpus == 8
    assert request(node, "evaluate", "tiny", "ppl").gpus == 2
    cpu = study_of(gpus=0, **changed)
    assert request(cpu, "evaluate", "tiny", "ppl").gpus == 0
    assert request(cpu, "throughput", "tiny").gpus == 0
    assert request(cpu, "job_case", None, case="two").gpus == 0


def test_hours_are_sums_over_jobs(root: Path) -> None:
    study = load_study(root / "config/athena.yaml")
    rows = {rule: (jobs, hours) for rule, jobs, hours in job_rows(study)}
    minutes = sum(study.task(t).minutes for _, t in study.eval_cells()) * len(study.seeds)
    assert rows["evaluate"][0] == len(study.models) * len(study.eval_cells())
    assert rows["evaluate"][1] == pytest.approx(len(study.models) * minutes / 60)
    jobs, hours = one_job_per_seed(study)
    more = rows["evaluate"][0] * (len(study.seeds) - 1)
    assert jobs == sum(j for j, _ in rows.values()) + more
    assert hours == pytest.approx(expected_gpu_hours(study) + more * 3 / 60)
