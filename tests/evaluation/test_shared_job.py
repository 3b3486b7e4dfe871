"""Tasks of one scheme that share a job, its process and its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.models import loading
from tests.support.pipeline import evaluate, measured_folder, options

TASKS = ("ppl", "passkey", "ppl-a")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of which the shared stages have run."""
    return measured_folder(tmp_path_factory.mktemp("shared"))


def words(work: Path, scheme: str, out: Path, *tasks: str) -> list[str]:
    """The command that evaluates all tasks in one process."""
    asking = [task for task in tasks if task == "passkey"]
    found = ["evaluate", *options(work, scheme), "--task", *tasks, "--seeds", "0", "1"]
    found += ["--out-dir", *(str(out / task) for task in tasks)]
    if asking:
        found += ["--prompts", *(str(work / f"{task}.jsonl.gz") for task in asking)]
    return [*found, "--data-manifest", *[str(work / "data.json")] * (len(tasks) - len(asking))]


@pytest.mark.parametrize("scheme", ["nuq3-1pct", "kivi-2"])
def test_tasks_in_one_process_give_what_each_gives_alone(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    loaded = []

    def load(*args: object, **options: object) -> object:
        loaded.append(args)
        return original(*args, **options)  # type: ignore[arg-type]

    original = loading.load_quantized_model
    monkeypatch.setattr(loading, "load_quantized_model", load)
    assert main(words(work, scheme, tmp_path / "together", *TASKS)) == 0
    assert len(loaded) == 1
    for task in TASKS:
        assert evaluate(work, scheme, task, tmp_path / "alone" / task, 0, 1) == 0
        for seed in (0, 1):
            file = f"{task}/seed{seed}/samples.jsonl"
            assert (tmp_path / "together" / file).read_bytes() == (
                tmp_path / "alone" / file
            ).read_bytes()
            assert (tmp_path / "together" / file).with_name("run.json").is_file()
    assert len(loaded) == 1 + len(TASKS)


def test_finished_tasks_of_a_killed_job_are_not_measured_again(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["--resume-dir", str(tmp_path / "resume")]
    assert main([*words(work, "fp16", tmp_path / "first", "ppl"), *keep]) == 0
    capsys.readouterr()
    assert main([*words(work, "fp16", tmp_path / "again", "ppl", "ppl-a"), *keep]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "bits/element" in line]
    assert [("resumed" in line) for line in told] == [True, True, False, False]


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--out-dir", ["a"], "--out-dir: needs one folder per task (ppl, passkey, ppl-a)"),
        ("--prompts", ["a", "b"], "--prompts: needs one file per task with answers (passkey)"),
        ("--data-manifest", ["a"], "--data-manifest: needs one manifest per text (ppl, ppl-a)"),
        ("--task", ["ppl", "ppl"], "--task: a task is given twice"),
        ("--task", ["ppl", "passky"], "unknown task 'passky'"),
    ],
)
def test_a_wrong_number_of_files_is_refused(
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    values: list[str],
    message: str,
) -> None:
    given = words(work, "fp16", tmp_path, *TASKS)
    start = given.index(option) + 1
    stop = next((i for i in range(start, len(given)) if given[i].startswith("--")), len(given))
    assert main([*given[:start], *values, *given[stop:]]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("run.json"))
