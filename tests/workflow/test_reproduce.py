"""The target reproduce: a published result is measured again by the workflow, and compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from kvquant.cli import main
from kvquant.study.publish import publish
from tests.support.models import save_byte_model
from tests.support.snakemakes import run_snakemake
from tests.support.text import write_corpus

EVALUATION = "eval/tiny/kivi-4/ppl/seed0/run.json"


def published_study(folder: Path) -> Path:
    """Measures two seeds of one task of one scheme, and publishes them; returns the study."""
    save_byte_model(folder / "hf")
    (folder / "resources/data/essays").mkdir(parents=True)
    text = write_corpus(folder / "resources/data/essays", "manifest.json")
    study = {
        "study": "tiny",
        "device": "cpu",
        "seeds": [0, 1],
        "headline": "kivi-4",
        "published": "published",
        "models": {"tiny": {"source": "local", "path": str(folder / "hf")}},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 16},
        },
        "tasks": {"ppl": {"suite": "perplexity", "dataset": "essays", "window": 96, "windows": 2}},
        "pathvars": {"results": "r", "paper": "p", "logs": "l", "cache": "resources"},
    }
    file = folder / "study.json"
    file.write_text(json.dumps(study))
    asked = ["--study", str(file), "--model", "tiny"]
    model = str(folder / "resources/models/tiny/manifest.json")
    assert main(["fetch-model", *asked, "--out", model]) == 0
    words = ["evaluate", *asked, "--scheme", "kivi-4", "--task", "ppl", "--seeds", "0", "1"]
    words += ["--model-manifest", model, "--data-manifest", str(text), "--device", "cpu"]
    assert main([*words, "--out-dir", str(folder / "first/eval/tiny/kivi-4/ppl")]) == 0
    publish(folder / "first", folder / "published")
    return file


def test_a_seed_is_measured_again_and_compared(root: Path, tmp_path: Path) -> None:
    published_study(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(root)}
    words = ["--snakefile", str(root / "Snakefile"), "--directory", str(tmp_path), "--cores", "2"]
    words += ["--configfile", str(tmp_path / "study.json"), "--replace-workflow-config"]
    words += ["--config", "reproduce={seeds: [1]}", "--", "reproduce"]
    done = run_snakemake(words, tmp_path, env)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Measuring 1 published results of published again: 0 are there, 1 are miss" in output
    assert re.search(r"^Measured again: \d+ reproduced, \d+ not judged: r-again/", output, re.M)
    made = sorted(f.parent.name for f in (tmp_path / "r-again/eval").rglob("run.json"))
    assert made == ["seed1"] and not (tmp_path / "r").exists()
    table = pd.read_csv(tmp_path / "r-again/tables/reproduce.csv")
    assert set(table["verdict"]) == {"reproduced", "not judged", "not run"}
    left = table[table["verdict"] == "not run"]
    assert left["results"].to_list() == [1] and left["note"].isna().all()  # seed 0, not planned
    assert "1 were measured again" in (tmp_path / "r-again/reproduce.html").read_text()
    # what was measured is not planned again, and the study itself still has its published records
    again = run_snakemake(["-n", *words], tmp_path, env)
    assert "Nothing to be done" in again.stdout + again.stderr
    shutil.rmtree(tmp_path / "r-again/eval")
    assert not re.search(r"^evaluate +\d", run_snakemake(
        ["-n", *words[:7], "--", "aggregate"], tmp_path, env).stdout, re.M)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ([], "reproduce: say what is measured again: `--config reproduce=true` for"),
        (["reproduce=true"], "this machine has no GPU; --config gpus=0 device=cpu measures"),
    ],
)
def test_what_cannot_be_measured_again_says_why(
    root: Path, tmp_path: Path, config: list[str], told: str
) -> None:
    (tmp_path / "pynvml.py").write_text("def nvmlInit(): raise OSError('no driver')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    folders = {name: f"{tmp_path}/{name[0]}" for name in ("results", "paper", "logs", "cache")}
    words = ["--nolock", "-n", "--config", f"pathvars={folders}", *config, "--", "reproduce"]
    done = run_snakemake(words, root, env)
    assert done.returncode == 1 and told in done.stdout + done.stderr
