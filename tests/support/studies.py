"""A small finished study as files: records, samples and resume files with plausible numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kvquant.benchmarks.timing import summarize
from kvquant.benchmarks.turns import Side, to_records
from kvquant.study import digests
from kvquant.study.config import Study, parse_study
from kvquant.study.prompt_lengths import prompt_lengths
from kvquant.study.records import (
    AppendPoint,
    AppendRecord,
    EnergyRecord,
    EnergySide,
    EvalRecord,
    KernelPart,
    KernelRecord,
    PerfSide,
    ThroughputRecord,
    write_record,
    write_samples,
)
from kvquant.study.sample_types import tail_size
from kvquant.study.tasks import SUITES

DEVICE = "gpu"
INPUTS = {"model": "a" * 64}
# A task of which every token can attend in 8 bits, which those of `study_of` are too short for.
LONG_CALLS = {"ppl": {"suite": "perplexity", "dataset": "essays", "window": 256, "windows": 3}}


def study_of(**changed: Any) -> Study:
    """Every suite and every measurement, three schemes."""
    workload = {"prompt": 64, "batch_size": 2, "answer": 4, "ragged": True}
    raw: dict[str, Any] = {
        "study": "check",
        "seeds": [0, 1],
        "headline": "nuq3",
        "models": {"tiny": {"source": "local", "path": "model"}},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "nuq3": {"kind": "nuq", "bits": 3},
            "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 16},
        },
        "tasks": {
            "ppl": {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": 3},
            "passkey": {"suite": "passkey", "length": 200, "samples": 4},
            "ruler": {"suite": "ruler", "task": "vt", "length": 400, "samples": 3},
            "qasper": {"suite": "longbench", "task": "qasper", "length": 400, "samples": 3},
        },
        "throughput": {"workloads": {"short": workload}, "reps": 2},
        "energy": {"workloads": {"short": workload}, "reps": 2, "trials": 5},
        "append": {"sizes": [64, 128], "chunks": [1], "reps": 2},
        "kernels": {"cases": {"one": {"shape": "tiny", "tokens": 64, "measure": ["pack"]}}},
    }
    return parse_study(raw | changed)


def sample_rows(suite: str, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Samples of a suite."""
    rows: list[dict[str, Any]] = []
    if suite == "perplexity":
        divergences = rng.random((count, 63)) ** 4
        largest = np.sort(divergences, axis=None)[-tail_size(divergences.size)]
    for index in range(count):
        if suite == "perplexity":
            nll = float(63 * (3 + rng.random()))
            more: dict[str, Any] = {"start": 64 * index, "tokens": 63, "nll": nll}
            more["kl"] = float(divergences[index].sum())
            tail = divergences[index][divergences[index] >= largest]
            more |= {"kl_tail": sorted(map(float, tail), reverse=True)}
            more["top1_agreed"] = int(rng.integers(50, 64))
        else:
            score = float(rng.integers(0, 2))
            more = {"prompt_tokens": 150 + index, "answer": f"\u2028{index}\n", "score": score}
        if suite == "passkey":
            more |= {"key": int(rng.integers(1, 50_000)), "depth": float(rng.random())}
        if suite in ("ruler", "longbench", "prompts"):
            more["references"] = [str(rng.integers(0, 9999))]
        if suite == "longbench":
            more |= {"row": 2 * index, "cut": bool(index % 2)}
        if suite == "prompts":
            more["row"] = index
        rows.append({"index": index, **more})
    return rows


def write_evaluation(
    study: Study,
    results: Path,
    model: str,
    scheme: str,
    task: str,
    seed: int,
    quantizer: str | None = None,
) -> None:
    """The two files of a seed; `quantizer` is the hash of the one it names."""
    spec = study.task(task)
    rng = np.random.default_rng([seed, *f"{scheme}{task}".encode()])
    rows = sample_rows(spec.suite, rng, spec.sample_count())
    rules = SUITES[spec.suite]
    summary = rules.summary(rows)
    metrics = dict(summary.metrics)
    if spec.suite == "longbench":
        metrics |= {"rows_available": 9.0, "rows_official": 200.0, "subset": 1.0}
    folder = results / "eval" / model / scheme / task / f"seed{seed}"
    prompts = f"{seed}" * 64 if SUITES[spec.suite].asks_prompts else None
    size = int(rng.integers(10_000, 20_000))
    record = EvalRecord(
        study=study.study,
        spec_digest=digests.eval_digest(study, model, scheme, task, seed),
        inputs=INPUTS
        | ({"quantizer": quantizer} if quantizer else {})
        | ({"prompts": prompts} if prompts else {"text": "e" * 64}),
        model=model,
        scheme=scheme,
        task=task,
        seed=seed,
        suite=spec.suite,
        protocol=spec.cache_protocol(),
        metric=rules.metric,
        higher_is_better=rules.higher_is_better,
        value=metrics[rules.metric],
        metrics=metrics,
        samples=len(rows),
        tokens=summary.tokens,
        cache_bytes=size,
        cache_elements=20_000,
        bits_per_element=8 * size / 20_000,
        samples_sha256=write_samples(folder / "samples.jsonl", rows),
        prompts_sha256=prompts,
        seconds=1.5,
    )
    write_record(folder / "run.json", record)


def _perf_side(name: str, rng: np.random.Generator, tokens: int, own: bool) -> PerfSide:
    rounds = [float(x) for x in 10 + rng.random(7)]
    prefill, decode = summarize(rounds), summarize([float(x) for x in 2 + rng.random(7)])
    return PerfSide(
        scheme=name,
        status="ok",
        prefill_ms=prefill,
        prefill_rounds_ms=rounds,
        decode_ms=decode,
        quantize_ms=summarize([float(x) for x in rng.random(5)]) if own else None,
        prefill_tokens_per_s=tokens / prefill.median * 1e3,
        decode_tokens_per_s=2 / decode.median * 1e3,
        peak_bytes=10**6,
        cache_bytes=4_000,
        cache_elements=8_000,
        bits_per_element=4.0,
    )


def _energy_side(name: str, rng: np.random.Generator, job: int) -> EnergySide:
    joules = [float(x) for x in 100 + rng.random(5)]
    seconds, tokens = [float(x) for x in 1 + rng.random(5)], [job * 3] * 5
    above = [j - 20.0 * s for j, s in zip(joules, seconds, strict=True)]
    return EnergySide(
        scheme=name,
        joules=joules,
        joules_above_idle=above,
        seconds=seconds,
        tokens=tokens,
        joules_per_token=sum(joules) / sum(tokens),
        joules_per_token_above_idle=sum(above) / sum(tokens),
    )


def write_timed(study: Study, results: Path, model: str) -> None:
    """Throughput and energy records."""
    for stage, cells in (("perf", study.throughput_cells()), ("energy", study.energy_cells())):
        for at, (scheme, workload, rep) in enumerate(cells):
            rng = np.random.default_rng([at, len(stage), *model.encode()])
            spec = study.throughput.workloads[workload]
            tokens = sum(prompt_lengths(spec))
            same: dict[str, Any] = {"study": study.study, "inputs": INPUTS, "device": DEVICE}
            same |= {"model": model, "scheme": scheme, "workload": workload, "rep": rep}
            file = results / stage / DEVICE / model / scheme / workload / f"rep{rep}.json"
            if stage == "perf":
                ours = _perf_side(scheme, rng, tokens, True)
                base = _perf_side(study.baseline, rng, tokens, False)
                assert ours.prefill_rounds_ms and base.prefill_rounds_ms
                assert ours.quantize_ms and base.prefill_ms
                pairs = zip(base.prefill_rounds_ms, ours.prefill_rounds_ms, strict=True)
                record: Any = ThroughputRecord(
                    **same,
                    spec_digest=digests.perf_digest(study, model, scheme, workload),
                    prompt_tokens=tokens,
                    batch_size=2,
                    scheme_side=ours,
                    baseline_side=base,
                    prefill_ratio=float(np.median([b / s for b, s in pairs])),
                    quantize_share=ours.quantize_ms.median / base.prefill_ms.median,
                )
            else:
                job = tokens + spec.batch_size * spec.answer
                mine = _energy_side(scheme, rng, job)
                other = _energy_side(study.baseline, rng, job)
                record = EnergyRecord(
                    **same,
                    spec_digest=digests.energy_digest(study, model, scheme, workload),
                    source="nvml",
                    method="GPU board energy, NVML total energy counter",
                    idle_watts=20.0,
                    scheme_side=mine,
                    baseline_side=other,
                    energy_ratio=mine.joules_per_token / other.joules_per_token,
                )
            write_record(file, record)


def write_costs(study: Study, results: Path) -> None:
    """Append and kernel records."""
    assert study.append is not None
    for rep in range(study.append.reps):
        rng = np.random.default_rng(rep)
        points = [
            AppendPoint(
                series=series,
                chunk=1,
                tokens=size,
                status="ok",
                token_ms=summarize([float(x) for x in rng.random(5)]),
                call_ms=summarize([float(x) for x in rng.random(5)]),
                cache_bytes=size * 1000,
            )
            for size in study.append.sizes
            for series in (*study.append_schemes(), "concatenation")
        ]
        shape = {n: getattr(study.append, n) for n in ("batch_size", "kv_heads", "head_dim")}
        append = AppendRecord(
            study=study.study,
            spec_digest=digests.append_digest(study),
            device=DEVICE,
            rep=rep,
            round_tokens={"1": 64},
            points=points,
            **shape,
        )
        write_record(results / "append" / DEVICE / f"rep{rep}.json", append)
    for name, case in study.kernel_cases().items():
        sides = [Side("copy", "copy", lambda: 0.0, 4_000_000)]
        sides.append(Side(study.headline, "ours", lambda: 0.0, 2_000_000))
        for side in sides:
            side.times = [1.0, 1.1, 1.2]
        parts = to_records(sides)
        kernels = KernelRecord(
            study=study.study,
            spec_digest=digests.kernels_digest(study, name),
            device=DEVICE,
            case=name,
            shape=case.shape,
            scheme=study.headline,
            batch=case.batch,
            tokens=case.tokens,
            all_tokens=case.tokens,
            parts=[KernelPart(measure="pack", copy_gb_per_s=parts[0].gb_per_s, sides=parts)],
            seconds=1.0,
        )
        write_record(results / "kernels" / DEVICE / f"{name}.json", kernels)


def write_study(study: Study, results: Path) -> Path:
    """All records of a study below `results`; returns the study's file."""
    for model in study.models:
        for scheme, task in study.eval_cells():
            for seed in study.seeds:
                write_evaluation(study, results, model, scheme, task, seed)
        write_timed(study, results, model)
    write_costs(study, results)
    file = results / "study.json"
    file.write_text(json.dumps(study.model_dump(mode="json")))
    return file


def eval_record(**changed: Any) -> EvalRecord:
    """A record of one seed, made without measuring."""
    fields: dict[str, Any] = {
        **{"study": "check", "spec_digest": "0" * 16, "model": "tiny", "scheme": "fp16"},
        **{"task": "passkey", "seed": 0, "suite": "passkey", "protocol": "A"},
        **{"metric": "accuracy", "higher_is_better": True, "value": 50.0},
        **{"metrics": {"accuracy": 50.0}, "samples": 2, "tokens": 300, "cache_bytes": 1000},
        **{"cache_elements": 500, "bits_per_element": 16.0, "samples_sha256": "a" * 64},
        **{"seconds": 1.5, "inputs": {"model": "b" * 64}},
    }
    return EvalRecord.model_validate(fields | changed)
