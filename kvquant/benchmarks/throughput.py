"""`kvquant throughput`: measures prefill, decode, quantization and memory of a workload."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.timing import (
    MIN_ROUNDS,
    Clock,
    interleave,
    peak_bytes,
    reset_peak,
    summarize,
)
from kvquant.benchmarks.workload import Prepared, prepare
from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.models.oom_retry import fits_in_memory
from kvquant.runtime.provenance import environment
from kvquant.study.digests import perf_digest
from kvquant.study.records import PerfSide, ThroughputRecord, write_record


@dataclass
class Side:
    """Measures one cache, one round per call.

    Attributes:
        prepared: The model and prompts.
        name: Name of the scheme.
        own: Whether the cache is the scheme's and not the baseline's.
        quantized: Whether the cache quantizes and reports the time of it.
        clock: Times a region of work.
        prefill: Milliseconds of each round's prefill.
        decode: Milliseconds per decode step of each round.
        quantize: Milliseconds of quantize-and-pack in each round.
        peak: Largest number of bytes that torch has held.
        cache_bytes: Bytes of the cache after the prefill.
        elements: Number of key and value elements in those bytes.
    """

    prepared: Prepared
    name: str
    own: bool
    quantized: bool
    clock: Clock
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    quantize: list[float] = field(default_factory=list)
    peak: int = 0
    cache_bytes: int = 0
    elements: int = 0

    def __call__(self) -> None:
        """Runs one round: prefill, then the answer on the same cache."""
        p, cuda = self.prepared, self.prepared.qm.device.type == "cuda"
        cache = p.scheme() if self.own else p.baseline()
        reset_peak(p.devices)
        token, elapsed = self.clock.time(lambda: p.prefill(cache))
        self.prefill.append(elapsed)
        self.peak = max(self.peak, peak_bytes(p.devices))
        self.cache_bytes = cache_nbytes(cache)
        self.elements = cache_elements(cache, p.batch.mask)
        if self.quantized and not cuda:
            self.quantize.append(cache.quantize_seconds * 1e3)
        if answer := p.workload.answer:
            _, elapsed = self.clock.time(lambda: p.decode(cache, token, answer))
            self.decode.append(elapsed / answer)

    def drop(self, rounds: int) -> None:
        """Keeps the last `rounds` measurements, as the others were a warm-up."""
        for values in (self.prefill, self.decode, self.quantize):
            del values[: max(0, len(values) - rounds)]

    def time_quantization(self, rounds: int) -> None:
        """Measures quantize-and-pack times on a GPU in separate rounds.

        The synchronization that they need would disturb the timing of the prefill.
        """
        for _ in range(rounds):
            cache: Any = self.prepared.scheme()
            cache.timed = True
            self.prepared.prefill(cache)
            self.quantize.append(cache.quantize_seconds * 1e3)

    def result(self, fits: bool) -> PerfSide:
        """Returns the measurements as a side of the record."""
        if not fits or not self.prefill:
            return PerfSide(scheme=self.name, status="oom")
        prefill = summarize(self.prefill)
        decode = summarize(self.decode) if self.decode else None
        batch = self.prepared.workload.batch_size
        return PerfSide(
            scheme=self.name,
            status="ok",
            prefill_ms=prefill,
            prefill_rounds_ms=self.prefill,
            decode_ms=decode,
            quantize_ms=summarize(self.quantize) if self.quantize else None,
            prefill_tokens_per_s=self.prepared.prompt_tokens / prefill.median * 1e3,
            decode_tokens_per_s=batch / decode.median * 1e3 if decode else None,
            peak_bytes=self.peak or None,
            cache_bytes=self.cache_bytes,
            cache_elements=self.elements,
            bits_per_element=8 * self.cache_bytes / self.elements,
        )


def paired_ratio(baseline: list[float], scheme: list[float]) -> float:
    """Returns the scheme's speed over the baseline's, the median of paired rounds."""
    return summarize([b / s for b, s in zip(baseline, scheme, strict=True)]).median


def measure(prepared: Prepared, scheme_name: str, clock: Clock) -> dict[str, Any]:
    """Times both caches in turns.

    Returns:
        The fields `scheme_side`, `baseline_side`, `prefill_ratio` and `quantize_share` of a
        :class:`ThroughputRecord`.
    """
    prepared.make_room()
    spec = prepared.study.throughput
    baseline = Side(prepared, prepared.study.baseline, False, False, clock)
    scheme = Side(prepared, scheme_name, True, prepared.quantizes, clock)
    rounds, fits = interleave(
        [baseline, scheme],
        warmup=spec.warmup,
        iterations=spec.iterations,
        max_seconds=spec.max_seconds,
    )
    baseline.drop(rounds)
    scheme.drop(rounds)
    if fits[1] and scheme.quantized and prepared.qm.device.type == "cuda":
        fits_in_memory(lambda: scheme.time_quantization(MIN_ROUNDS))
    ratio = share = None
    if all(fits):
        ratio = paired_ratio(baseline.prefill, scheme.prefill)
        if scheme.quantize:
            share = summarize(scheme.quantize).median / summarize(baseline.prefill).median
    return {
        "scheme_side": scheme.result(fits[1]),
        "baseline_side": baseline.result(fits[0]),
        "prefill_ratio": ratio,
        "quantize_share": share,
    }


def show(record: ThroughputRecord, console: Console) -> None:
    """Prints the record as a table."""
    table = Table(title=f"{record.workload} on {record.device}: {record.prompt_tokens:,} tokens")
    heads = ("prefill ms", "tok/s", "decode ms", "quantize ms", "cache MB", "peak GB", "bits")
    table.add_column("cache")
    for name in heads:
        table.add_column(name, justify="right")
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
            f"{(side.cache_bytes or 0) / 1e6:,.2f}",
            f"{side.peak_bytes / 1e9:,.2f}" if side.peak_bytes else "-",
            f"{side.bits_per_element:.2f}",
        )
    console.print(table)
    if record.prefill_ratio is not None:
        console.print(f"prefill speed over the baseline: {record.prefill_ratio:.3f}")
    if record.quantize_share is not None:
        console.print(f"quantize and pack: {record.quantize_share:.1%} of the baseline's prefill")


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant throughput`."""
    prepared = prepare(args, lambda study: study.throughput.workloads)
    measured = measure(prepared, args.scheme, Clock.of(*prepared.devices))
    record = ThroughputRecord(
        study=prepared.study.study,
        spec_digest=perf_digest(prepared.study, args.model, args.scheme, args.workload),
        environment=environment(prepared.devices),
        inputs=prepared.inputs,
        device=args.device_name,
        model=args.model,
        scheme=args.scheme,
        workload=args.workload,
        rep=args.rep,
        prompt_tokens=prepared.prompt_tokens,
        batch_size=prepared.workload.batch_size,
        **measured,
    )
    write_record(args.out, record)
    show(record, Console(width=100))
