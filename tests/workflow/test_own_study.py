"""A study that `kvquant init` wrote, by the commands that it and the workflow print."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from kvquant.cli import main
from kvquant.runtime.run_end import claim_lines, result_lines
from tests.support.models import save_tiny
from tests.support.snakemakes import run_snakemake

RUN_HERE = (
    *("fetch-model", "prompts", "calibrate", "quantize", "evaluate", "aggregate"),
    *("statistics", "pareto", "claims", "tables"),
)


def snakemake(work: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs a printed command of Snakemake."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": folders, "PYTHONPATH": str(Path(__file__).parents[2])}
    return run_snakemake([*shlex.split(command)[1:], *more], work, env)


def verbs(output: str) -> list[list[str]]:
    """The words of each command of kvquant that a dry run prints, in the order of the jobs."""
    found = []
    for line in re.findall(r"python -m kvquant (.+)", output):
        words = shlex.split(line)
        ends = [words.index(mark) for mark in (">", "2>&1") if mark in words]
        found.append(words[: min(ends)])
    return found


def jobs(output: str) -> dict[str, int]:
    return {m[1]: int(m[2]) for m in re.finditer(r"^(\w+) +(\d+)$", output, re.M)}


@pytest.fixture(scope="module")
def work(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the workflow, a tiny model, a text and prompts."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("Snakefile", "workflow", "config"):
        (folder / name).symlink_to(root / name)
    save_tiny(folder / "model")
    lines = (f"Line {n} says that {n} squared is {n * n}.\n" for n in range(300))
    (folder / "notes.txt").write_text("".join(lines))
    prompts = ({"prompt": f"What are {n} and {n * n}? " * 4} for n in range(4))
    (folder / "asked.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def test_from_init_to_tables(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.delenv("UV", raising=False)  # `uv run` sets it, and init then prints `uv run ...`
    words = ["init", "--model", "model", "--text", "notes.txt", "--prompts", "asked.jsonl"]
    assert main(words) == 0
    dry, run = re.findall(r"^  (snakemake .+)", capfd.readouterr().out, re.M)
    assert "profiles/cpu" in dry  # tests have no GPU
    file = work / "notes.yaml"
    file.write_text(file.read_text().replace("seeds: [0, 1, 2, 3, 4]", "seeds: [0, 1]"))
    planned = snakemake(work, dry, "--printshellcmds")
    assert planned.returncode == 0, planned.stderr
    output = planned.stdout + planned.stderr
    counts = {"own_data": 2, "calibrate": 1, "quantize": 3, "prompts": 1, "evaluate_all": 5}
    assert jobs(output).items() >= counts.items()
    texts = [f"results/notes/texts/{name}/manifest.json" for name in ("notes", "asked")]
    made = snakemake(work, run, *texts)
    assert made.returncode == 0, made.stdout + made.stderr
    assert all((work / text).is_file() for text in texts)
    for command in verbs(output):
        if command[0] in RUN_HERE:
            assert main(command) == 0, (command, capfd.readouterr().err)
    tests = pd.read_csv("results/notes/tables/tests.csv")
    asked = tests[tests.task == "asked"]
    assert (asked.baseline_mean == 100).all() and (asked.paired_by == "row").all()
    assert asked["mean"].between(0, 100).all() and len(asked) == 4
    assert "asked, agreement" in Path("results/notes/paper/tables/prompts.tex").read_text()
    lines = result_lines(Path("results/notes/tables"), "fp16")
    assert len(lines) == 5 and all("ppl-b " in line and "asked " in line for line in lines)
    assert "16.00 bits" in lines[0] and lines[0].endswith("asked 100")
    (told,) = claim_lines(Path("results/notes/tables/claims.csv"))
    assert "not measured here" in told and "tables/claims.csv" in told

    # an edited text is named, and what depends on it is measured again
    with (work / "notes.txt").open("a") as stream:
        stream.write("One more line.\n")
    again = snakemake(work, dry)
    output = again.stdout + again.stderr
    assert "datasets.notes: notes.txt was edited since the last run" in output
    # by the same run: with the new text read and the old results kept, the next one would do it
    counts = {"own_data": 1, "calibrate": 1, "quantize": 3, "evaluate_all": 5, "aggregate": 1}
    assert jobs(output).items() >= counts.items()
    assert "prompts" not in jobs(output)
    # or refused, where the study gives its hash
    text = file.read_text().replace("    test_share", f"    sha256: [{'a' * 64}]\n    test_share")
    file.write_text(text)
    refused = snakemake(work, dry)
    assert refused.returncode == 1
    assert "datasets.notes.sha256: notes.txt was edited (its sha256 is" in (
        refused.stdout + refused.stderr
    )
