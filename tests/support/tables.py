"""Tables as `aggregate` makes them, with plausible numbers, for any study."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvquant.analysis.eval_rows import SUITE_METRICS
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.tables import write_table
from kvquant.study.config import Study
from kvquant.study.overlay import read_study
from kvquant.study.tasks import SUITES, LongBenchTask, PasskeyTask

TITLE = r"50 % of #1 & $2 {x} a_b \ ~ ^ é ß µ 中 <>"
REPS = 2
ROWS = 12  # of a LongBench task


def damage(study: Study, scheme: str) -> float:
    """How much a scheme loses: nothing at 16 bits, more with fewer bits."""
    bits = getattr(study.schemes[scheme], "bits", 16)
    return {16: 0.0, 8: 0.01, 4: 0.05, 3: 0.3, 2: 1.0}[round(bits)]


def record(*names: object) -> dict[str, str]:
    """The beginning of the seal of a row's record, another one for each."""
    return {"record": f"{zlib.crc32(repr(names).encode()):012x}"}


def accuracy_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables `eval` and `samples`."""
    rows, samples = [], []
    for model in study.models:
        for scheme in study.schemes:
            for name, task in study.tasks.items():
                for seed in study.seeds:
                    # the samples are the seed's, whatever the scheme
                    hard = np.random.default_rng(zlib.crc32(f"{model}{name}{seed}".encode()))
                    noise = np.random.default_rng(zlib.crc32(f"{scheme}{name}{seed}".encode()))
                    loss = damage(study, scheme)
                    suite = SUITES[task.suite]
                    facts: dict[str, object] = {"higher_is_better": suite.higher_is_better}
                    facts["metric"] = suite.metric
                    likelihood = suite.metric_type == "likelihood"
                    if likelihood:
                        score = 3.0 + 0.05 * hard.normal(size=8) + 0.2 * loss
                        score = score + 0.01 * loss * noise.normal(size=8)
                        value = float(np.exp(score.mean()))
                        if getattr(task, "kl", False):
                            facts |= {
                                "kl": 0.15 * loss,
                                "kl_p99": 2.1 * loss,
                                "kl_p999": 4.7 * loss,
                            }
                            facts["top1_agreement"] = 1 - 0.2 * loss
                    else:
                        count = task.sample_count() or ROWS
                        depth = np.linspace(0, 1, count)
                        chance = 0.95 - 0.75 * loss * (0.3 + 0.7 * depth)
                        if isinstance(task, PasskeyTask):
                            chance = chance - 0.5 * loss * task.length / 8192
                        score = (hard.random(count) < chance).astype(float)
                        value = float(100 * score.mean())
                    if isinstance(task, LongBenchTask):
                        facts |= {"rows_available": ROWS, "rows_official": 200}
                    bits = {0.0: 16.0, 0.01: 8.5, 0.05: 4.6, 0.3: 3.6, 1.0: 2.6}[loss]
                    key = {"model": model, "scheme": scheme, "task": name, "suite": task.suite}
                    size: dict[str, float] = {"samples": len(score), "tokens": 4096 * len(score)}
                    size |= {"cache_bytes": int(bits * 1e6), "cache_elements": 8_000_000}
                    size |= {"bits_per_element": bits}
                    key_of_row = {**key, "seed": seed, "protocol": "A", "value": value}
                    rows.append(key_of_row | size | facts | record(scheme, model, name, seed))
                    shares_rows = isinstance(task, LongBenchTask)
                    samples += [
                        {**key, "seed": seed, "sample": at, "score": float(one)}
                        | {"row": (at + seed) % ROWS if shares_rows else None}
                        | {"start": 2048 * (8 * seed + at) if likelihood else None}
                        | {"tokens": 2047 if likelihood else None}
                        for at, one in enumerate(score)
                    ]
    extra = dict.fromkeys(SUITE_METRICS, np.nan)
    return pd.DataFrame([extra | row for row in rows]).astype(dict.fromkeys(extra, float)), (
        pd.DataFrame(samples).astype(dict.fromkeys(("row", "start", "tokens"), "Int64"))
    )


def timed_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables `perf` and `energy`."""
    perf, energy = [], []
    rng = np.random.default_rng(0)
    for model in study.models:
        for scheme, workload, rep in study.throughput_cells():
            key = {"device": "gpu", "model": model, "scheme": scheme, "workload": workload}
            row: dict[str, Any] = {**key, "rep": rep, "scheme_rounds": 100}
            row |= record("perf", *key.values(), rep)
            row |= {"prompt_tokens": 16384, "batch_size": 4, "quantize_share": rng.uniform(0, 0.1)}
            for part, low, high in (("prefill", 0.9, 1.0), ("decode", 0.7, 2.0)):
                ratio = rng.uniform(low, high)
                row |= {f"{part}_ratio": ratio, f"base_{part}_ms_median": 100.0}
                ends = {"median": 1.0, "p10": 0.97, "p90": 1.04, "p99": 1.1}
                row |= {f"scheme_{part}_ms_{n}": 100 / ratio * end for n, end in ends.items()}
            row |= {f"scheme_quantize_ms_{n}": 5.0 * end for n, end in ends.items()}
            for part, speed in (("prefill", 26000.0), ("decode", 50.0)):
                row |= {f"base_{part}_ms_{n}": 100 * e for n, e in ends.items()}
                row[f"scheme_{part}_tokens_per_s"] = speed * row[f"{part}_ratio"]
                row[f"base_{part}_tokens_per_s"] = speed
            perf.append(row)
        for scheme, workload, rep in study.energy_cells():
            key = {"device": "gpu", "model": model, "scheme": scheme, "workload": workload}
            ratio = 0.55 + 0.05 * damage(study, scheme)
            joules = {"scheme_joules_per_token": 0.02 * ratio, "base_joules_per_token": 0.02}
            joules |= {f"{n}_{e}": v * f for n, v in joules.items()
                       for e, f in (("low", 0.98), ("high", 1.03))}  # fmt: skip
            more = {"rep": rep, "source": "nvml", "energy_ratio": ratio, "scheme_trials": 5}
            ends = {"energy_ratio_low": 0.98 * ratio, "energy_ratio_high": 1.02 * ratio}
            energy.append({**key, **more, **joules, **ends, **record("energy", *key.values(), rep)})
    columns = ["device", "model", "scheme", "workload", "rep"]
    return (
        pd.DataFrame(perf, columns=None if perf else columns),
        pd.DataFrame(energy, columns=None if energy else columns),
    )


def job_table(study: Study) -> pd.DataFrame:
    """Table `jobs`: ours holds five times as much as fp16 and is three times as fast."""
    rows = []
    for name, case in study.job_cases().items():
        for scheme in case.schemes:
            fp16 = study.schemes[scheme].kind in ("fp16", "fp16-static")
            faster = 1.0 if fp16 else 3.0
            row: dict[str, Any] = {"device": "gpu", "case": name, "scheme": scheme, "status": "ok"}
            row |= {"shape": case.shape, "prompt": case.prompt, "answer": case.answer}
            decoder = "CUDA graph" if case.num_gpus == 1 else "from Python"
            row |= {"gpus": case.num_gpus, "decoder": decoder}
            row |= {"trials": 5, "jobs": 5, "emulated": True}
            row |= {"batch_size": 2 if fp16 else 10, "memory_bytes": 40 * 10**9}
            row["weight_bytes"] = 13 * 10**9
            row |= {"capacity_tokens": 40_000 if fp16 else 200_000, "formula_tokens": 210_000}
            row["context_tokens"] = None
            row |= {"prefill_tokens_per_s": 26_000.0, "peak_bytes": 35 * 10**9}
            row |= {"first_token_ms_median": 600.0, "bits_per_element": 16.0 if fp16 else 3.4}
            for part in ("median", "p10", "p90", "p99"):
                row[f"step_ms_{part}"] = 10.0 * (1 + case.prompt / 65536) / faster
            row["step_ms_n"] = 640
            ended = {"job_tokens_per_s": 4000.0 * faster, "decode_tokens_per_s": 90.0 * faster}
            ended |= {"joules_per_token": 0.12 / faster, "joules_per_prompt_token": 0.026}
            ended["joules_per_answer_token"] = 2.9 / faster
            for key, value in ended.items():
                row |= {key: value, f"{key}_low": 0.99 * value, f"{key}_high": 1.01 * value}
            row |= {"counter_over_power": 1.001, "idle_watts": 120.0}
            row["joules_per_token_above_idle"] = 0.1 / faster
            row["source"] = "nvml" if case.energy else None
            row |= record("jobs", name)
            rows.append(row)
    return pd.DataFrame(rows)


def write_tables(study: Study, folder: Path) -> None:
    """All tables that figures, LaTeX tables and claims read."""
    evaluations, samples = accuracy_tables(study)
    perf, energy = timed_tables(study)
    tests = compare_all(study, evaluations, samples)
    tables = {"eval": evaluations, "samples": samples, "perf": perf, "energy": energy}
    tables |= {"tests": tests, "pareto": pareto_table(study, evaluations, perf, energy)}
    if study.jobs is not None:
        tables["jobs"] = job_table(study)
    for name, table in tables.items():
        write_table(table, folder / f"{name}.parquet")


def two_models(root: Path, *, ruler: str = "multikey", **changes: Any) -> dict[str, Any]:
    """The paper's own study with two repetitions of all that is timed; `ruler` names its tasks."""
    raw = read_study(root / "config/athena.yaml")
    for stage in ("throughput", "energy"):
        raw[stage] = {**raw[stage], "reps": REPS}
    raw["energy"]["schemes"] = ["nuq3-1pct", "kivi-4"]
    del raw["append"], raw["kernels"]
    # small, so that the tests are fast: their subject is which rows there are
    raw["seeds"] = [0, 1]
    raw["statistics"]["bootstrap"] = 100
    kept = ("ppl-wikitext2-b", "passkey-2k", "passkey-4k", "longbench-lcc", "longbench-qasper")
    raw["tasks"] = {
        n: t for n, t in raw["tasks"].items() if n in kept or f"ruler-niah-{ruler}" in n
    }
    raw["evaluation"] = {"schemes": ["fp16", "nuq4-1pct", "nuq3-1pct", "nuq2-1pct", "kivi-4"]}
    raw["throughput"].pop("schemes", None)
    raw["schemes"] = {
        n: s
        for n, s in raw["schemes"].items()
        if n in raw["evaluation"]["schemes"] or s["kind"] == "kvquant-ref"
    }
    for task in raw["tasks"].values():
        if "samples" in task:
            task["samples"] = min(task["samples"], 5)
    return {**raw, "title": TITLE, **changes}
