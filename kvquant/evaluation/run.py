"""`kvquant evaluate`: one scheme on one task, for any number of seeds with the model loaded once.

Every finished seed is also kept in the resume folder under its digest. A job that was killed, or
that gets further seeds later, takes the finished ones from there instead of measuring them again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from kvquant.config import MAX_SEED, load_study
from kvquant.errors import UserError
from kvquant.provenance import environment
from kvquant.records import EvalRecord, read_record, sha256_text, write_new, write_record
from kvquant.records import write_samples as write_rows
from kvquant.specs import dataset_of, eval_digest, needs_calibration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant evaluate`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--seeds", required=True, nargs="+", type=int)
    parser.add_argument("--model-manifest", required=True, type=Path)
    parser.add_argument("--data-manifest", type=Path, help="for perplexity and RULER")
    parser.add_argument("--quantizer", type=Path, help="quantizer.json, for calibrated schemes")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--out-dir", required=True, type=Path, help="gets seed{n}/run.json")
    parser.add_argument("--resume-dir", type=Path, help="keeps finished seeds of killed jobs")


def _resumed(folder: Path | None, digest: str, out: Path) -> bool:
    """Takes a finished seed from the resume folder; a damaged one is removed."""
    if folder is None:
        return False
    kept, rows = folder / f"{digest}.json", folder / f"{digest}.jsonl"
    if not (kept.is_file() and rows.is_file()):
        return False
    text = rows.read_text(encoding="utf-8")
    try:
        record = read_record(kept, EvalRecord)
    except UserError:
        record = None
    if record is None or record.spec_digest != digest or record.samples_sha256 != sha256_text(text):
        kept.unlink(missing_ok=True)
        rows.unlink(missing_ok=True)
        return False
    write_new(out / "samples.jsonl", text)
    write_record(out / "run.json", record)
    return True


def run(args: argparse.Namespace) -> None:
    """Evaluates the given seeds and writes their records."""
    study = load_study(args.study)
    study.model(args.model)
    scheme, task = study.scheme(args.scheme), study.task(args.task)
    for seed in args.seeds:
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"--seeds: {seed} is not between 0 and {MAX_SEED}")
    if needs_calibration(scheme) and args.quantizer is None:
        raise UserError(f"--quantizer: needed for scheme '{args.scheme}' (run `quantize`)")
    if dataset_of(task) and args.data_manifest is None:
        raise UserError(f"--data-manifest: needed for task '{args.task}'")
    digests = {
        seed: eval_digest(study, args.model, args.scheme, args.task, seed) for seed in args.seeds
    }
    left = []
    for seed in args.seeds:
        if _resumed(args.resume_dir, digests[seed], args.out_dir / f"seed{seed}"):
            print(f"evaluate: seed {seed} was finished before", file=sys.stderr, flush=True)
        else:
            left.append(seed)
    if not left:
        return

    from kvquant.evaluation.registry import SUITES
    from kvquant.models import load_quantized_model, read_manifest

    qm = load_quantized_model(
        read_manifest(args.model_manifest),
        scheme,
        quantizer=args.quantizer if needs_calibration(scheme) else None,
        device=args.device,
    )
    for seed in left:
        start = time.perf_counter()
        result = SUITES[task.suite](qm, task, seed, args.data_manifest)
        out = args.out_dir / f"seed{seed}"
        digest = write_rows(out / "samples.jsonl", result.samples)
        record = EvalRecord(
            study=study.study,
            spec_digest=digests[seed],
            environment=environment(),
            model=args.model,
            scheme=args.scheme,
            task=args.task,
            seed=seed,
            suite=task.suite,
            protocol=result.protocol,
            metric=result.metric,
            higher_is_better=result.higher_is_better,
            value=result.metrics[result.metric],
            metrics=result.metrics,
            samples=len(result.samples),
            tokens=result.tokens,
            cache_bytes=result.cache_bytes,
            cache_elements=result.cache_elements,
            bits_per_element=8 * result.cache_bytes / result.cache_elements,
            samples_sha256=digest,
            seconds=time.perf_counter() - start,
        )
        if args.resume_dir is not None:
            rows = (out / "samples.jsonl").read_text(encoding="utf-8")
            write_new(args.resume_dir / f"{digests[seed]}.jsonl", rows)
            write_record(args.resume_dir / f"{digests[seed]}.json", record)
        write_record(out / "run.json", record)
        print(
            f"evaluate: {args.scheme} {args.task} seed {seed}: {result.metric} "
            f"{record.value:.3f}, {record.bits_per_element:.2f} bits/element, "
            f"{record.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
