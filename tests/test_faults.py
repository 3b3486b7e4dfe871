"""Every verb, killed at each write and run again; full disks, closed folders, odd surroundings.

Each run is a forked process in which an audit hook watches the files that are opened for writing,
renamed, linked or removed below the output folder. It ends the process at the n-th of these, as a
kill does, or answers as a full disk does; without --all-combinations at the first of them and at
ever fewer later ones. Run again without a fault, a verb must leave what a run that was never
disturbed leaves.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvquant.cli import VERBS, main
from kvquant.runtime.provenance import environment
from tests.support.forks import ended, forked, start
from tests.support.models import save_byte_model
from tests.support.text import write_corpus

pytestmark = pytest.mark.slow
KILLED = 137
IMPORTED_LATER = (
    *(f"kvquant.evaluation.{name}" for name in ("divergence", "passkey", "perplexity")),
    *("kvquant.models.loading", "transformers.models.auto.tokenization_auto"),
    *("pandas.io.formats.csvs", "pyarrow.dataset", "pyarrow.pandas_compat"),
)
SCHEMES = {"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3, "block_size": 32}}
TASKS = {
    "ppl": {"suite": "perplexity", "dataset": "essays", "window": 96, "windows": 1},
    "passkey": {"suite": "passkey", "length": 600, "samples": 1, "batch_size": 1},
}


@dataclass(frozen=True)
class Job:
    """A verb with its options; `{out}` in them is the folder of its outputs."""

    name: str
    words: tuple[str, ...]

    def run(self, out: Path) -> int:
        """The verb's exit status."""
        return main([word.replace("{out}", str(out)) for word in self.words])


def watch(folder: Path, at: int, act: Callable[[], None]) -> None:
    """Calls `act` at the n-th write below a folder, from 1; for a forked process only."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            writes = event in ("os.link", "os.rename", "os.remove")
        if writes and isinstance(args[0], str | Path) and str(args[0]).startswith(str(folder)):
            count += 1
            if count == at:
                act()

    sys.addaudithook(hook)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder, without what two runs need not share (times and their seals)."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        raw: Any = file.read_bytes()
        if file.suffix == ".json":
            raw = json.loads(raw)
            for name in ("seconds", "seal"):
                raw.pop(name, None)
        found[str(file.relative_to(folder))] = raw
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved model, a text and a study."""
    folder = tmp_path_factory.mktemp("faults")
    save_byte_model(folder / "hf")
    write_corpus(folder)
    study = {
        "study": "faults",
        "device": "cpu",
        "seeds": [0, 1],
        "headline": "nuq3",
        "models": {"tiny": {"source": "local", "path": str(folder / "hf"), "gpus": 0}},
        "calibration": {"windows": 1, "window": 64},
        "schemes": SCHEMES,
        "tasks": TASKS,
        "pathvars": {"results": str(folder / "done")},
    }
    (folder / "study.json").write_text(json.dumps(study))
    return folder


@pytest.fixture(scope="module")
def jobs(work: Path) -> Iterator[dict[str, Job]]:
    """The verbs in the workflow's order; all ran once into `done`."""
    # Once here, not in each of hundreds of forked processes, of which it would take half the time.
    for module in (*(module for module, _ in VERBS.values()), *IMPORTED_LATER):
        importlib.import_module(module)
    environment()
    done = work / "done"
    base = ("--study", str(work / "study.json"))
    model = (*base, "--model", "tiny")
    ours = ("--model-manifest", str(done / "fetch/model.json"))
    data = ("--data-manifest", str(work / "data.json"))
    cpu = ("--device", "cpu")
    made = ("--quantizer", str(done / "quantize/quantizer.json"))
    asked = ("--prompts", str(done / "prompts/passkey.jsonl.gz"))
    seeds = ("--seeds", "0", "1")
    tables = (*base, "--tables", str(done / "tables"))
    stats = str(done / "calibrate/stats.safetensors")
    once = {
        "fetch": ["fetch-model", *model, "--out", "{out}/model.json"],
        "calibrate": ["calibrate", *model, *ours, *data, *cpu, "--out", "{out}/stats.safetensors"],
        "quantize": ["quantize", *model, "--scheme", "nuq3", "--stats", stats],
        "prompts": ["prompts", *model, *ours, "--task", "passkey", *seeds],
    }
    once["quantize"] += ["--out", "{out}/quantizer.json"]
    once["prompts"] += ["--out", "{out}/passkey.jsonl.gz"]
    found = [Job(name, tuple(words)) for name, words in once.items()]
    for scheme in SCHEMES:
        for task in TASKS:
            words = ["evaluate", *model, *ours, *cpu, "--scheme", scheme, "--task", task, *seeds]
            words += asked if task == "passkey" else data
            words += made if scheme == "nuq3" else ()
            words += ["--out-dir", "{out}", "--resume-dir", "{out}/../resume"]
            found.append(Job(f"eval/tiny/{scheme}/{task}", tuple(words)))
    collect = ["aggregate", *base, "--results", str(done), "--device-name", "cpu"]
    found.append(Job("tables", (*collect, "--out-dir", "{out}")))
    found.append(Job("statistics", ("statistics", *tables, "--out-dir", "{out}")))
    for job in found:
        status, said = forked(functools.partial(job.run, done / job.name))
        assert status == 0, f"{job.name}: {said}"
    yield {job.name: job for job in found}


NAMES = (
    "fetch",
    "calibrate",
    "quantize",
    "prompts",
    "eval/tiny/nuq3/ppl",
    "eval/tiny/nuq3/passkey",
    "tables",
    "statistics",
)


def places(every: bool) -> Iterator[int]:
    """The writes that are disturbed: each, or the first ones and then ever fewer."""
    at = 1
    while at < 400:
        yield at
        at += 1 if every else max(1, at // 2)


def disturbed(
    job: Job, work: Path, tmp_path: Path, act: Callable[[], None], every: bool
) -> Iterator[tuple[int, Path, int, str]]:
    """Runs a job with a fault at a write, and at a later one, until none is left to disturb."""
    expected = contents(work / "done" / job.name)
    for at in places(every):
        out = tmp_path / str(at) / "out"

        def run(at: int = at, out: Path = out) -> int:
            watch(out.parent, at, act)
            return job.run(out)

        status, said = forked(run)
        if status == 0 and contents(out) == expected:
            return
        yield at, out, status, said
        again, said = forked(lambda out=out: job.run(out))  # type: ignore[misc]
        assert again == 0, f"{job.name} after a fault at write {at}: {said}"
        assert contents(out) == expected, f"{job.name} after a fault at write {at}"
    raise AssertionError("never ends")


@pytest.mark.fault(
    "files",
    "a kill at each write, rename and link of every verb",
    "run again, the verb leaves what an undisturbed run leaves",
)
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_write_and_run_again(
    jobs: dict[str, Job], work: Path, tmp_path: Path, name: str, all_combinations: bool
) -> None:
    count = 0
    faults = disturbed(jobs[name], work, tmp_path, lambda: os._exit(KILLED), all_combinations)
    for at, _, status, said in faults:
        assert status == KILLED, f"write {at}: {said}"
        count += 1
    assert count >= 2


@pytest.mark.fault(
    "files",
    "a full disk at each write of every verb",
    "one line; run again, all is as undisturbed",
)
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line(
    jobs: dict[str, Job], work: Path, tmp_path: Path, name: str, all_combinations: bool
) -> None:
    count = 0
    for at, _, status, said in disturbed(jobs[name], work, tmp_path, full, all_combinations):
        assert status in (0, 2), f"write {at}: {said}"
        assert "Traceback" not in said, f"write {at}: {said}"
        count += status == 2
    assert count >= 1


@pytest.mark.fault(
    "files",
    "a disk that fills up within a file",
    "an error; no file is cut short under its final name",
)
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fills_up_while_writing_is_one_line(
    jobs: dict[str, Job], tmp_path: Path, name: str
) -> None:
    def run() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))
        return jobs[name].run(tmp_path / "out")

    status, said = forked(run)
    assert status == 2 and "kvquant: error:" in said and "Traceback" not in said, said
    made = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not made, "a file that was cut short has its final name, or a temporary one is left"


@pytest.mark.fault(
    "files",
    "a file where the output folder should be",
    "one line with its path",
)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_where_the_folder_should_be_is_one_line(
    jobs: dict[str, Job], tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").write_text("")
    status, said = forked(lambda: jobs[name].run(tmp_path / "out"))
    assert status == 2, said
    assert "Traceback" not in said and str(tmp_path / "out") in said


SURROUNDINGS = {
    "no HOME, C locale": {
        **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR")),
        **{"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    },
    "HOME that does not exist, Turkish, far away": {
        **{"HOME": "/no/such/home", "XDG_CACHE_HOME": None, "TZ": "Pacific/Chatham"},
        **{"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
    },
}


@pytest.mark.fault(
    "files",
    "no HOME, a HOME that does not exist, C and Turkish locales, another time zone",
    "the same results, byte for byte",
)
@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("where", "name"), [*zip(SURROUNDINGS, ("eval/tiny/nuq3/passkey", "prompts"), strict=True)]
)
def test_surroundings_change_no_result(
    jobs: dict[str, Job], work: Path, tmp_path: Path, where: str, name: str
) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    for key, value in SURROUNDINGS[where].items():
        env.pop(key, None) if value is None else env.update({key: value})
    job = jobs[name]
    out = tmp_path / "a" / "out"
    words = [word.replace("{out}", str(out)) for word in job.words]
    done = subprocess.run(
        [sys.executable, "-m", "kvquant", *words],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(work / "done" / job.name)


@pytest.mark.fault(
    "files",
    "the same job twice at once",
    "one whole result; the other run ends in one line",
)
def test_two_runs_at_once_leave_one_whole_result(
    jobs: dict[str, Job], work: Path, tmp_path: Path
) -> None:
    job = jobs["eval/tiny/nuq3/ppl"]
    out = tmp_path / "a" / "out"
    children = [start(lambda: job.run(out)) for _ in range(2)]
    found = [ended(*child) for child in children]
    codes, said = [status for status, _ in found], [text for _, text in found]
    assert 0 in codes and set(codes) <= {0, 2}, said  # times differ, so the second is refused
    assert not any("Traceback" in text for text in said), said
    assert contents(out) == contents(work / "done" / job.name)


@pytest.mark.fault(
    "files",
    "a clock that jumps back and runs backwards",
    "the same results; durations stay positive",
)
def test_a_clock_that_jumps_back_changes_no_result(
    jobs: dict[str, Job], work: Path, tmp_path: Path
) -> None:
    job = jobs["eval/tiny/fp16/ppl"]
    out = tmp_path / "a" / "out"

    def run() -> int:
        import time

        real, start = time.time, time.time()
        time.time = lambda: 2 * start - real() - 86400.0  # type: ignore[assignment]
        return job.run(out)

    status, said = forked(run)
    assert status == 0, said
    assert contents(out) == contents(work / "done" / job.name)
    assert json.loads((out / "seed0/run.json").read_text())["seconds"] >= 0
