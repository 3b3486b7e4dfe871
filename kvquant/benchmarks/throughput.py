"""`kvquant throughput`: prefill, decode, quantization and memory of one workload."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.timing import interleave, summarize, synchronize
from kvquant.benchmarks.workload import Prepared, add_common_arguments, prepare
from kvquant.cache import cache_elements, cache_nbytes
from kvquant.provenance import environment
from kvquant.records import PerfSide, ThroughputRecord, write_record
from kvquant.specs import perf_digest

add_arguments = add_common_arguments


@dataclass
class _Side:
    """Measurements of one cache; a call runs and times one round."""

    prepared: Prepared
    name: str
    quantized: bool
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    quantize: list[float] = field(default_factory=list)
    peak: int = 0
    cache_bytes: int = 0
    elements: int = 0

    def __call__(self) -> None:
        p, device = self.prepared, self.prepared.qm.device
        cuda = device.type == "cuda"
        cache = p.scheme() if self.quantized else p.baseline()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        token = p.prefill(cache)
        synchronize(device)
        self.prefill.append((time.perf_counter() - start) * 1e3)
        if cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device))
        self.cache_bytes = cache_nbytes(cache)
        self.elements = cache_elements(cache, p.mask)
        if self.quantized and not cuda:
            self.quantize.append(cache.quantize_seconds * 1e3)
        if p.workload.answer:
            start = time.perf_counter()
            p.decode(cache, token, p.workload.answer)
            synchronize(device)
            self.decode.append((time.perf_counter() - start) * 1e3 / p.workload.answer)

    def drop(self, rounds: int) -> None:
        """Keeps the last `rounds` measurements (the others were warm-up)."""
        for values in (self.prefill, self.decode, self.quantize):
            del values[: max(0, len(values) - rounds)]

    def result(self, fits: bool) -> PerfSide:
        """The record's side."""
        if not fits or not self.prefill:
            return PerfSide(scheme=self.name, status="oom")
        prefill = summarize(self.prefill)
        decode = summarize(self.decode) if self.decode else None
        batch = self.prepared.workload.batch_size
        return PerfSide(
            scheme=self.name,
            status="ok",
            prefill_ms=prefill,
            decode_ms=decode,
            quantize_ms=summarize(self.quantize) if self.quantize else None,
            prefill_tokens_per_s=self.prepared.prompt_tokens / prefill.median * 1e3,
            decode_tokens_per_s=batch / decode.median * 1e3 if decode else None,
            peak_bytes=self.peak or None,
            cache_bytes=self.cache_bytes,
            cache_elements=self.elements,
            bits_per_element=8 * self.cache_bytes / self.elements,
        )


def _timed_quantization(prepared: Prepared, rounds: int) -> list[float]:
    """Quantize-and-pack milliseconds on a GPU, in rounds of their own.

    The synchronization that this needs would disturb the prefill's timing.
    """
    times = []
    for _ in range(rounds):
        cache: Any = prepared.scheme()
        cache.timed = True
        prepared.prefill(cache)
        times.append(cache.quantize_seconds * 1e3)
    return times


def _print(record: ThroughputRecord) -> None:
    table = Table(title=f"{record.workload} on {record.device}: {record.prompt_tokens:,} tokens")
    for name in ("cache", "prefill ms", "tok/s", "decode ms", "quantize ms", "bits/element"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for side in (record.baseline_side, record.scheme_side):
        if side.status == "oom" or side.prefill_ms is None:
            table.add_row(side.scheme, "out of memory")
            continue
        table.add_row(
            side.scheme,
            f"{side.prefill_ms.median:,.1f}",
            f"{side.prefill_tokens_per_s:,.0f}",
            f"{side.decode_ms.median:,.1f}" if side.decode_ms else "-",
            f"{side.quantize_ms.median:,.1f}" if side.quantize_ms else "-",
            f"{side.bits_per_element:.2f}",
        )
    console = Console(width=100)
    console.print(table)
    if record.prefill_ratio is not None:
        console.print(f"prefill speed over the baseline: {record.prefill_ratio:.3f}")
    if record.quantize_share is not None:
        console.print(f"quantize and pack: {record.quantize_share:.1%} of the baseline's prefill")


def run(args: argparse.Namespace) -> None:
    """Measures one workload and writes its record."""
    prepared = prepare(args, lambda study: study.throughput.workloads)
    spec = prepared.study.throughput
    baseline = _Side(prepared, prepared.study.baseline, quantized=False)
    scheme = _Side(prepared, args.scheme, quantized=True)
    rounds, fits = interleave(
        [baseline, scheme],
        warmup=spec.warmup,
        iterations=spec.iterations,
        max_seconds=spec.max_seconds,
    )
    baseline.drop(rounds)
    scheme.drop(rounds)
    both = all(fits) and bool(baseline.prefill) and bool(scheme.prefill)
    if fits[1] and prepared.qm.device.type == "cuda" and prepared.qm.codecs is not None:
        scheme.quantize = _timed_quantization(prepared, 5)
    ratio = share = None
    if both:
        pairs = zip(baseline.prefill, scheme.prefill, strict=True)
        ratio = summarize([b / s for b, s in pairs]).median
        if scheme.quantize:
            share = summarize(scheme.quantize).median / summarize(baseline.prefill).median
    record = ThroughputRecord(
        study=prepared.study.study,
        spec_digest=perf_digest(prepared.study, args.model, args.scheme, args.workload),
        environment=environment(),
        device=args.device_name,
        model=args.model,
        scheme=args.scheme,
        workload=args.workload,
        rep=args.rep,
        prompt_tokens=prepared.prompt_tokens,
        batch_size=prepared.workload.batch_size,
        scheme_side=scheme.result(fits[1]),
        baseline_side=baseline.result(fits[0]),
        prefill_ratio=ratio,
        quantize_share=share,
    )
    write_record(args.out, record)
    _print(record)
