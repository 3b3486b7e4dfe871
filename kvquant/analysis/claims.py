"""`kvquant claims`: each claim with its definition, the measured value and the verdict.

A claim reads the tables of one model and returns what was measured, on how much, and whether that
meets the bar, or says why this study cannot speak to it. A verdict asks for a stated minimum of
evidence; below it, and where the interval holds the bar, it is "not enough evidence". No number is
typed: bars come from the definitions, values from the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from kvquant.analysis.evidence import (
    MIN_PROMPTS,
    MIN_ROUNDS,
    MIN_SEEDS,
    MIN_TRIALS,
    VERDICTS,
    Outcome,
    against_bar,
    interval,
    not_measured,
)
from kvquant.analysis.pareto import counted
from kvquant.analysis.tables import read_table
from kvquant.config import Study, load_study
from kvquant.files import replace as write_file

ANY = "any"  # in place of a model, of what is measured without one
KEPT = ("identical", "equivalent", "better", "better (within margin)", "worse (within margin)")


@dataclass(frozen=True)
class Tables:
    """What claims may read."""

    study: Study
    evaluations: pd.DataFrame
    perf: pd.DataFrame
    energy: pd.DataFrame
    tests: pd.DataFrame
    pareto: pd.DataFrame
    append: pd.DataFrame

    @property
    def on_gpu(self) -> bool:
        """Whether timings come from a GPU."""
        return self.study.gpus > 0

    def devices(self) -> list[str]:
        """Names of the devices on which something was timed."""
        timed = [t["device"] for t in (self.perf, self.energy, self.append) if "device" in t]
        return list(dict.fromkeys(name for names in timed for name in names))

    def of(self, model: str) -> Tables:
        """The rows of one model; what is measured without a model stays."""
        names = ("evaluations", "perf", "energy", "tests", "pareto")
        tables = {name: getattr(self, name) for name in names}
        return replace(
            self, **{n: t[t["model"] == model] if "model" in t else t for n, t in tables.items()}
        )

    def headline_tests(self, suite: str) -> pd.DataFrame:
        """Comparisons of the headline scheme on the tasks of a suite."""
        if "level" not in self.tests:
            return self.tests
        rows = self.tests[(self.tests.level == "task") & (self.tests.suite == suite)]
        return rows[rows.scheme == self.study.headline]

    def headline_perf(self) -> pd.DataFrame:
        """Throughput rows of the headline scheme."""
        return self.perf[self.perf["scheme"] == self.study.headline]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper; one that needs a model is judged for each."""

    name: str
    definition: str
    judge: Callable[[Tables], Outcome]
    needs_model: bool = True


def _ordering(t: Tables) -> Outcome:
    """Loss grows with every step to fewer bits among our schemes, paired by seed."""
    head = t.study.schemes[t.study.headline]
    by_bits = {
        s.bits: name
        for name, s in t.study.schemes.items()
        if s.kind == head.kind == "nuq" and s.model_copy(update={"bits": head.bits}) == head
    }
    language = t.evaluations[t.evaluations.suite == "perplexity"]
    if len(by_bits) < 2 or not len(language):
        return not_measured("needs perplexity and two bit widths")
    order = [t.study.baseline, *(by_bits[b] for b in sorted(by_bits, reverse=True))]
    names = ["fp16", *(f"{b} bit" for b in sorted(by_bits, reverse=True))]
    parts, met, seeds = [], [], []
    for task, group in language.groupby("task", sort=False):
        values = {s: rows.set_index("seed")["value"] for s, rows in group.groupby("scheme")}
        if not set(order) <= set(values):
            continue
        shown = []
        for i in range(1, len(order)):
            step = (values[order[i]] - values[order[i - 1]]).to_numpy(dtype=float)
            low, high = interval(step, t.study.statistics.alpha)
            met.append(against_bar(low, high, 0.0, at_most=False))
            seeds.append(int((step == step).sum()))
            shown.append(f"{names[i]} {step.mean():+.2f} [{low:+.2f}, {high:+.2f}]")
        parts.append(f"{task}, each over the one before: {', '.join(shown)}")
    if not parts:
        return not_measured("no perplexity task that all bit widths ran")
    whole = False if False in met else (None if None in met else True)
    return Outcome("; ".join(parts), whole, f"{min(seeds)} seeds", min(seeds) >= MIN_SEEDS)


def _loss_on_7b(t: Tables) -> Outcome:
    rows = t.headline_tests("perplexity")
    rows = rows[rows.model.str.contains("llama-2-7b")] if len(rows) else rows
    if not len(rows):
        return not_measured("a claim about Llama-2-7B")
    row = rows.loc[rows.difference.idxmax()] if rows.difference.notna().any() else rows.iloc[0]
    met = against_bar(row.ci_low, row.ci_high, 0.1, at_most=True)
    seeds = int(rows.pairs.min())
    value = f"{row.task}: {row.difference:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
    return Outcome(value, met, f"{seeds} seeds", seeds >= MIN_SEEDS)


def _passkey(t: Tables) -> Outcome:
    rows = t.headline_tests("passkey")
    if not len(rows):
        return not_measured("no passkey task")
    parts = [
        f"{r['task']}: {r['mean']:.1f} % for {r['baseline_mean']:.1f} %, {r['verdict']}"
        for r in rows.to_dict("records")
    ]
    prompts = int(rows.sample_pairs.min())
    verdicts = list(rows.verdict)
    met = False if "worse" in verdicts else (True if set(verdicts) <= set(KEPT) else None)
    enough = prompts >= MIN_PROMPTS and int(rows.pairs.min()) >= MIN_SEEDS
    return Outcome("; ".join(parts), met, f"{prompts} prompts per task", enough)


def _bits(t: Tables) -> Outcome:
    rows = t.evaluations[t.evaluations.scheme == t.study.headline]
    if not len(rows):
        return not_measured("the headline scheme is not evaluated")
    bits, lengths = 8 * rows.cache_bytes / rows.cache_elements, rows.tokens / rows.samples
    if lengths.max() < 16_000:
        longest = int(lengths.max())
        return not_measured(f"{bits[lengths == lengths.max()].max():.2f} at {longest:,} tokens")
    long = bits[lengths >= 16_000]
    value = f"{long.max():.2f} (most of {len(long)} results)"
    return Outcome(value, against_bar(long.max(), long.max(), 3.6, at_most=True), "allocated bytes")


def _worst(rows: pd.DataFrame, column: str, *, largest: bool) -> tuple[str, pd.DataFrame]:
    """The workload whose median over repetitions is worst, and its rows with a value."""
    rows = rows[rows[column].notna()]
    medians = rows.groupby("workload")[column].median()
    name = str(medians.idxmax() if largest else medians.idxmin())
    return name, rows[rows.workload == name]


def _spread(rows: pd.DataFrame, column: str) -> str:
    values = rows[column].astype(float)
    if len(values) == 1:
        return f"{values.iloc[0]:.3f}"
    return f"{values.median():.3f} [{values.min():.3f}, {values.max():.3f}]"


def _rounds(rows: pd.DataFrame) -> tuple[str, bool]:
    """Evidence of a timed claim, and whether it suffices."""
    fewest, reps = int(rows.scheme_rounds.min()), len(rows)
    return f"{reps} repetition{'s' * (reps > 1)} of {fewest} rounds or more", fewest >= MIN_ROUNDS


def _prefill(t: Tables) -> Outcome:
    rows = t.headline_perf()
    if not len(rows) or rows["prefill_ratio"].isna().all():
        return not_measured("no throughput measured")
    name, worst = _worst(rows, "prefill_ratio", largest=False)
    value = f"{_spread(worst, 'prefill_ratio')} ({name}, the worst workload)"
    if not t.on_gpu:
        return not_measured(f"{value} on {worst['device'].iloc[0]}; defined for a GPU")
    ratio = worst.prefill_ratio
    met = against_bar(ratio.min(), ratio.max(), 0.98, at_most=False)
    return Outcome(value, met, *_rounds(worst))


def _quantize_share(t: Tables) -> Outcome:
    rows = t.headline_perf()
    if not len(rows) or rows["quantize_share"].isna().all():
        return not_measured("no throughput measured")
    name, worst = _worst(rows, "quantize_share", largest=True)
    share = worst.quantize_share
    met = against_bar(share.min(), share.max(), 0.15, at_most=True)
    value = f"{_spread(worst, 'quantize_share')} of the prefill ({name}, the worst workload)"
    return Outcome(value, met, *_rounds(worst))


def _energy(t: Tables) -> Outcome:
    rows = t.energy[t.energy["scheme"] == t.study.headline] if len(t.energy) else t.energy
    if not len(rows):
        return not_measured("no energy measured")
    measured = counted(rows)
    if not len(measured) or measured["energy_ratio"].isna().all():
        return not_measured("an estimate without counters")
    name, worst = _worst(measured, "energy_ratio", largest=True)
    ratio, trials = worst.energy_ratio, int(worst.scheme_trials.min())
    met = against_bar(ratio.min(), ratio.max(), 0.55, at_most=True)
    evidence = f"{len(worst)} x {trials} trials"
    return Outcome(
        f"{_spread(worst, 'energy_ratio')} ({name})", met, evidence, trials >= MIN_TRIALS
    )


def append_growth(points: pd.DataFrame, series: str) -> tuple[float, int, int] | None:
    """Cost of a token, one a call, at the largest size over that at the smallest.

    Args:
        points: The table `append`.
        series: A scheme, or "concatenation".

    Returns:
        (ratio of medians over rounds, smallest size, largest size), the worst repetition's; None
        where it was not measured at two sizes.
    """
    found: list[tuple[float, int, int]] = []
    if len(points):
        mine = points[
            (points.series == series) & (points.chunk == 1) & points.token_ms_median.notna()
        ]
        for _, rep in mine.groupby("rep"):
            ends = rep.sort_values("tokens").iloc[[0, -1]]
            cost, sizes = ends.token_ms_median.to_list(), ends.tokens.to_list()
            if sizes[0] < sizes[1] and cost[0] > 0:
                found.append((cost[1] / cost[0], int(sizes[0]), int(sizes[1])))
    return max(found) if found else None


def _append(t: Tables) -> Outcome:
    ours = append_growth(t.append, t.study.headline)
    if ours is None:
        return not_measured("append is not measured in this study")
    theirs = append_growth(t.append, "concatenation")
    beside = f"; {theirs[0]:.2f} where arrays are concatenated" if theirs else ""
    value = f"{ours[0]:.2f} from {ours[1]:,} to {ours[2]:,} tokens{beside}"
    if ours[2] < 128 * ours[1]:
        return not_measured(f"{value}; defined from 1K to 128K")
    mine = t.append[t.append.series == t.study.headline]
    rounds = int(mine.token_ms_n.min())
    met = against_bar(ours[0], ours[0], 1.2, at_most=True)
    return Outcome(value, met, f"{rounds} rounds or more", rounds >= MIN_ROUNDS)


def _over_reference(t: Tables) -> Outcome:
    """Prefill over KVQuant's procedure on the same workload, both against the same baseline."""
    names = [n for n, s in t.study.schemes.items() if s.kind == "kvquant-ref"]
    theirs = t.perf[t.perf["scheme"].isin(names)] if len(t.perf) else t.perf
    ours = t.headline_perf() if len(t.perf) else t.perf
    if not len(theirs) or not len(ours):
        return not_measured("the reference scheme is not timed in this study")
    both = ours.merge(theirs, on=["workload", "rep"], suffixes=("", "_ref"))
    both = both.assign(speed=both.prefill_ratio / both.prefill_ratio_ref)
    if both.speed.isna().all():
        return not_measured("no workload that both ran")
    name, worst = _worst(both, "speed", largest=False)
    value = f"{_spread(worst, 'speed')} ({name}, the worst workload)"
    if not t.on_gpu:
        return not_measured(f"{value}; defined for a GPU")
    met = against_bar(worst.speed.min(), worst.speed.max(), 3.0, at_most=False)
    return Outcome(value, met, *_rounds(worst))


CLAIMS = (
    Claim(
        "Loss grows as bits fall",
        "perplexity, protocol of the task: fp16 < 4 < 3 < 2 bits, 1 % outliers, paired by seed: "
        f"the 95 % interval of every step above 0, at least {MIN_SEEDS} seeds",
        _ordering,
    ),
    Claim(
        "Under 0.1 perplexity at 3 bits",
        "headline scheme against fp16 on Llama-2-7B, upper end of the 95 % interval below 0.1 on "
        f"every perplexity task, at least {MIN_SEEDS} seeds",
        _loss_on_7b,
    ),
    Claim(
        "Passkey retrieval kept",
        "headline scheme against fp16, protocol A, paired test of every passkey task: not worse "
        f"beyond the margin, at least {MIN_PROMPTS} prompts and {MIN_SEEDS} seeds per task",
        _passkey,
    ),
    Claim(
        "At most 3.6 bits per element",
        "headline scheme, allocated bytes over elements at 16K tokens or more",
        _bits,
    ),
    Claim(
        "Prefill at fp16 speed",
        "headline scheme over fp16, prefill tokens/s, interleaved, GPU: at least 0.98 in every "
        f"repetition of the worst workload, at least {MIN_ROUNDS} rounds",
        _prefill,
    ),
    Claim(
        "Quantization is cheap",
        "headline scheme: quantize and pack over the fp16 prefill: at most 15 % in every "
        f"repetition of the worst workload, at least {MIN_ROUNDS} rounds",
        _quantize_share,
    ),
    Claim(
        "Energy per token falls by 45 %",
        "headline scheme over fp16, whole job, measured by counters: at most 0.55 in every "
        f"repetition of the worst workload, at least {MIN_TRIALS} trials",
        _energy,
    ),
    Claim(
        "Append cost does not grow",
        "headline scheme, one layer, one token a call: cost of a token, packing of its block "
        f"included, at 128K tokens over 1K, medians of at least {MIN_ROUNDS} rounds: at most 1.2",
        _append,
        needs_model=False,
    ),
    Claim(
        "Three times the prefill of KVQuant's procedure",
        "prefill tokens/s over a one-sequence, growing-array reference, GPU: at least 3 in every "
        f"repetition of the worst workload, at least {MIN_ROUNDS} rounds",
        _over_reference,
    ),
    Claim(
        "Four times the tokens in 40 GB",
        "tokens that fit in a 40 GB budget over fp16: at least 4",
        lambda t: not_measured("capacity is not measured in this study"),
        needs_model=False,
    ),
)


def judge(tables: Tables) -> pd.DataFrame:
    """The claims table: a row a claim and model; `model` is "any" where none is needed."""
    rows = []
    for claim in CLAIMS:
        for model in tables.study.models if claim.needs_model else [ANY]:
            outcome = claim.judge(tables.of(model) if claim.needs_model else tables)
            rows.append(
                {
                    "claim": claim.name,
                    "model": model,
                    "definition": claim.definition,
                    "measured": outcome.value,
                    "evidence": outcome.evidence,
                    "verdict": outcome.verdict,
                }
            )
    return pd.DataFrame(rows)


def claim_lines(table: pd.DataFrame) -> list[str]:
    """The claims as plain lines, for the end of a run."""
    several = table.model[table.model != ANY].nunique() > 1
    return [
        f"{row.verdict:<20} {row.claim}{f' ({row.model})' if several else ''}: {row.measured}"
        for row in table.itertuples()
    ]


def load_tables(study: Study, folder: Path, *, accuracy_only: bool = False) -> Tables:
    """All tables of a study, or only those that its evaluations fill; the others are then empty."""
    if accuracy_only:
        none = pd.DataFrame()
        evaluations, tests = read_table(folder, "eval"), read_table(folder, "tests")
        return Tables(study, evaluations, none, none, tests, none, none)
    names = ("eval", "perf", "energy", "tests", "pareto")
    evaluations, perf, energy, tests, pareto = (read_table(folder, name) for name in names)
    append = read_table(folder, "append") if study.append else pd.DataFrame()
    return Tables(study, evaluations, perf, energy, tests, pareto, append)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant claims`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out", required=True, type=Path, help="claims.csv")
    parser.add_argument("--tex", required=True, type=Path, help="claims.tex")


def run(args: argparse.Namespace) -> None:
    """Writes the claims as CSV and LaTeX."""
    from kvquant.analysis.booktabs import booktabs

    study = load_study(args.study)
    table = judge(load_tables(study, args.tables))
    write_file(args.out, table.to_csv(index=False))
    several = len(study.models) > 1
    shown = (
        table[["model", *table.columns.drop("model")]] if several else table.drop(columns="model")
    )
    columns = "L{1.9cm}" * several + "L{2.4cm}L{4.3cm}L{3.3cm}L{2cm}L{1.7cm}"
    write_file(args.tex, booktabs(shown, columns, size="scriptsize", tight=True, pages=True))
    counts = table["verdict"].value_counts()
    print("claims: " + ", ".join(f"{counts.get(v, 0)} {v}" for v in VERDICTS))
