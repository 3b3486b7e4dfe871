"""The workflow by real Snakemake runs that start no measuring job."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.snakemakes import run_snakemake

COUNTS = {
    "demo": {
        "prompts": 2,
        "evaluate_all": 6,
        "calibrate": 1,
        "quantize": 3,
        "plot": 6,
        "append_cost": 1,
    },
    "smoke": {
        "prompts": 2,
        "evaluate": 12,
        "throughput": 1,
        "energy": 1,
        "kernel_case": 1,
        "plot": 6,
    },
}


def snakemake(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    bin_dir = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    return run_snakemake(["--nolock", "-n", *args], root, env)


def jobs(output: str) -> dict[str, int]:
    return {m[1]: int(m[2]) for m in re.finditer(r"^(\w+) +(\d+)$", output, re.M)}


def fresh(tmp_path: Path) -> list[str]:
    """Options that put all outputs of a study, and what it fetches, into an empty folder."""
    folders = {name: f"{tmp_path}/{name[0]}" for name in ("results", "paper", "logs", "cache")}
    return ["--config", f"pathvars={folders}"]


def study(root: Path, tmp_path: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    config = ["--configfile", f"config/{name}.yaml", "--replace-workflow-config"]
    return snakemake(root, *args, *config, *fresh(tmp_path))


@pytest.mark.parametrize("name", list(COUNTS))
def test_job_counts(root: Path, tmp_path: Path, name: str) -> None:
    done = study(root, tmp_path, name)
    assert done.returncode == 0, done.stderr
    found = jobs(done.stdout + done.stderr)
    for rule, count in COUNTS[name].items():
        assert found[rule] == count, found


@pytest.mark.parametrize("name", ["athena"])
def test_other_studies_plan(root: Path, tmp_path: Path, name: str) -> None:
    done = study(root, tmp_path, name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert jobs(done.stdout + done.stderr)["evaluate"] >= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "seeds=3"], "seeds: Input should be a valid list"),
        (["--config", "data_dir=/no/such/folder"], "data_dir: no such folder"),
        (["--config", "sedes=[1]"], "sedes: unknown key"),
    ],
)
def test_mistakes_are_one_clear_line(root: Path, options: list[str], message: str) -> None:
    config = ["--configfile", "config/smoke.yaml", "--replace-workflow-config"]
    done = snakemake(root, *config, *options)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert message in output
    assert "Traceback" not in output


def test_unknown_wildcard_fails_while_planning(root: Path) -> None:
    target = "results/smoke/eval/smollm2-135m/nuq9-1pct/ppl-b/seed0/run.json"
    config = ["--configfile", "config/smoke.yaml", "--replace-workflow-config"]
    done = snakemake(root, *config, target)
    assert done.returncode != 0
    assert "MissingRuleException" in done.stdout + done.stderr


def test_a_variant_is_planned_with_what_its_base_says(root: Path, tmp_path: Path) -> None:
    folders = {name: f"{tmp_path}/{name[0]}" for name in ("results", "paper", "logs", "cache")}
    base = {"base": str(root / "config/smoke.yaml"), "pathvars": folders}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    variant = {"base": "base.yaml", "seeds": [0, 7], "tasks": {"passkey-256": None}}
    (tmp_path / "variant.yaml").write_text(yaml.safe_dump(variant))
    config = ["--configfile", str(tmp_path / "variant.yaml"), "--replace-workflow-config"]
    done = snakemake(root, *config, "-p", "accuracy")
    assert done.returncode == 0, done.stderr[-2000:]
    output = done.stdout + done.stderr
    assert jobs(output)["evaluate"] == 8 and "passkey" not in output
    assert f"--study {tmp_path}/r/study.json --model smollm2-135m --scheme fp16" in output
    assert f"--out-dir {tmp_path}/r/eval/" in output and "--seeds 0 7 " in output

    (tmp_path / "variant.yaml").write_text("base: bose.yaml\n")
    done = snakemake(root, *config)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "variant.yaml: base: no such file: " in output and "Traceback" not in output


def test_released_results_rebuild_figures_without_measuring(root: Path, tmp_path: Path) -> None:
    from kvquant.study.config import load_study

    spec = load_study(root / "config/smoke.yaml")
    results = tmp_path / "r"
    files = [
        results / f"eval/{m}/{s}/{t}/seed{n}/{f}"
        for m in spec.models
        for s in spec.schemes
        for t in spec.tasks
        for n in spec.seeds
        for f in ("run.json", "samples.jsonl")
    ]
    for kind, cells in (("perf", spec.throughput_cells()), ("energy", spec.energy_cells())):
        for m in spec.models:
            files += [results / f"{kind}/cpu/{m}/{s}/{w}/rep{r}.json" for s, w, r in cells]
    files += [results / f"kernels/cpu/{case}.json" for case in spec.kernel_cases()]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    done = study(root, tmp_path, "smoke", f"{tmp_path}/p/figures/pareto.pdf")
    assert done.returncode == 0, done.stderr
    found = jobs(done.stdout + done.stderr)
    assert {"aggregate", "statistics", "pareto", "plot"} <= set(found)
    assert not {
        "evaluate",
        "prompts",
        "calibrate",
        "quantize",
        "throughput",
        "energy",
        "fetch_model",
    } & set(found)
    assert "kernel_case" not in found


def test_stages_have_an_aggregate_target_and_a_short_name(root: Path) -> None:
    config = ["--configfile", "config/smoke.yaml", "--replace-workflow-config"]
    done = snakemake(root, "--list-target-rules", *config)
    assert done.returncode == 0, done.stderr[-2000:]
    found = set(re.findall(r"^\w+", done.stdout, re.M))
    short = {"questions", "accuracy", "performance", "joules", "appends", "kernels", "figures"}
    assert found >= short | {"tables", "claims", "html", "report_page"}
    stages = {"prompts", "accuracy", "throughput", "energy", "append", "kernels", "figures"}
    stages |= {"tables", "claims", "pages", "explorer", "report"}
    assert found >= {"all", *(f"all_{stage}" for stage in stages)}


def test_each_kernel_case_is_a_job(root: Path, tmp_path: Path) -> None:
    done = study(root, tmp_path, "athena", "kernels", "-p")
    assert done.returncode == 0, done.stderr[-2000:]
    output = done.stdout + done.stderr
    from kvquant.study.config import load_study

    cases = load_study(root / "config/athena.yaml").kernel_cases()
    assert jobs(output) == {"kernel_case": len(cases), "kernels": 1, "total": len(cases) + 1}
    for case in cases:
        assert f"bench kernels --study {tmp_path}/r/study.json --cases {case} --dev" in output
    assert f"--out-dir {tmp_path}/r/kernels/a100-sxm4-40gb" in output
    none = study(root, tmp_path, "demo", "kernels")  # has no such section
    assert none.returncode == 0, none.stderr[-2000:]
    assert "kernel_case" not in jobs(none.stdout + none.stderr)


@pytest.mark.slow
def test_a_fork_of_the_server_tells_what_a_new_process_does(root: Path, tmp_path: Path) -> None:
    """So that a test's Snakemake is the one that users run (:mod:`tests.support.snakemakes`)."""
    config = ["--configfile", "config/smoke.yaml", "--replace-workflow-config", *fresh(tmp_path)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["--nolock", "-n", "--quiet", "host", *config, "--", "tables"]
    real = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    fork = run_snakemake(words, root, env)
    assert fork.returncode == real.returncode == 0
    for one, other in ((fork.stdout, real.stdout), (fork.stderr, real.stderr)):
        # Jobs and files come in any order, and each block begins with the time.
        told = [sorted(re.sub(r"\[.*\]", "", text).split()) for text in (one, other)]
        told = [[word.strip(",;") for word in words] for words in told]
        assert sorted(told[0]) == sorted(told[1])
    assert len(real.stdout.splitlines()) > 50


def test_the_workflow_imports_no_torch(root: Path) -> None:
    code = (
        "import sys, kvquant.study.config, kvquant.study.digests, kvquant.study.grid\n"
        "import kvquant.runtime.provenance, kvquant.cli\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_tracking_is_planned_only_where_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    """Nothing depends on it: it is in no plan of a study with a section `tracking`."""
    file = tmp_path / "tracked.yaml"
    file.write_text(f"base: {root / 'config/smoke.yaml'}\ntracking: {{}}\n", encoding="utf-8")
    config = ["--configfile", str(file), "--replace-workflow-config", *fresh(tmp_path)]
    everything = jobs(snakemake(root, *config).stdout)
    assert everything["aggregate"] == 1 and "track" not in everything
    asked = jobs(snakemake(root, *config, "--", "track").stdout)
    assert asked["track"] == 1 and asked["evaluate"] == everything["evaluate"]
    assert not {"aggregate", "plot", "tables"} & set(asked)


def test_measurements_do_not_need_companions(root: Path, tmp_path: Path) -> None:
    """A measurement does not read other studies; a missing file of one is named in the refusal."""
    raw = yaml.safe_load((root / "config/smoke.yaml").read_text())
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(raw | {"companions": {"other": str(tmp_path / "none.yaml")}}))
    config = ["--configfile", str(file), "--replace-workflow-config", *fresh(tmp_path)]
    measured = snakemake(root, *config, "--", "accuracy")
    assert measured.returncode == 0, measured.stderr[-2000:]
    claims = snakemake(root, *config, "--", "all_claims")
    assert claims.returncode != 0
    assert f"companions: no such file: {tmp_path}/none.yaml" in claims.stdout + claims.stderr
