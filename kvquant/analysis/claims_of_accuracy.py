"""Verdicts of the claims about accuracy and size: loss by bits, passkeys, bits per element."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from kvquant.analysis.bars import Bar
from kvquant.analysis.claim_list import CLAIMS, MIN_PROMPTS, MIN_SEEDS
from kvquant.analysis.evidence import Outcome, every, interval, not_measured, over_seeds
from kvquant.analysis.loss_ratio import loss_ratio
from kvquant.analysis.study_tables import Tables
from kvquant.study.schemes import AllocatedScheme, NuqScheme, SchemeSpec

LONG = 16_000  # tokens of a prompt, of the claim about size
KEPT = ("identical", "equivalent", "better", "better (within margin)", "worse (within margin)")


@dataclass(frozen=True)
class Part:
    """One of the comparisons of which a claim asks for all, with its seeds and their windows."""

    workload: str
    value: float
    ends: tuple[float, float]
    n: int
    windows: int
    cache: str
    baseline: str


def _whole(t: Tables, measured: str, parts: list[Part], bar: Bar) -> Outcome:
    """Returns the outcome of a claim that holds where every part of it does, paired by seed.

    Its value is that of the worst part: the one that is nearest to missing the bar.
    """
    known = [part for part in parts if part.value == part.value] or parts
    worst = max(known, key=lambda part: bar.worst(part.ends))
    seeds = min(part.n for part in parts)
    others = "" if len(parts) == 1 else f" (the worst of {len(parts)})"
    return Outcome(
        measured,
        every(bar.met(*part.ends) for part in parts),
        seeds,
        f"seeds of {min(part.windows for part in parts):,} windows or more",
        seeds >= MIN_SEEDS,
        *(worst.value, *worst.ends, over_seeds(t.study.statistics.alpha)),
        cache=worst.cache,
        baseline=worst.baseline,
        workload=worst.workload + others,
    )


def ordering(t: Tables) -> Outcome:
    """Judges whether loss grows with every step to fewer bits among our schemes, paired by seed."""
    head = t.study.schemes[t.study.headline]
    by_bits = {
        s.bits: name
        for name, s in t.study.schemes.items()
        if isinstance(s, NuqScheme)
        and isinstance(head, NuqScheme)
        and s.model_copy(update={"bits": head.bits, "label": head.label}) == head
    }
    language = t.evaluations[t.evaluations.suite == "perplexity"]
    if len(by_bits) < 2 or not len(language):
        return not_measured("needs perplexity and two bit widths")
    order = [t.study.baseline, *(by_bits[b] for b in sorted(by_bits, reverse=True))]
    names = ["fp16", *(f"{b} bits" for b in sorted(by_bits, reverse=True))]
    texts, parts = [], list[Part]()
    for task, group in language.groupby("task", sort=False):
        values = {s: rows.set_index("seed")["value"] for s, rows in group.groupby("scheme")}
        if not set(order) <= set(values):
            continue
        shown = []
        for i in range(1, len(order)):
            step = (values[order[i]] - values[order[i - 1]]).to_numpy(dtype=float)
            low, high = ends = interval(step, t.study.statistics.alpha)
            both = [t.labels.scheme(order[at]) for at in (i, i - 1)]
            where, seeds = t.labels.task(str(task)), int((step == step).sum())
            windows = int(group.samples.min())
            parts.append(Part(where, float(step.mean()), ends, seeds, windows, *both))
            shown.append(f"{names[i]} {step.mean():+.2f} [{low:+.2f}, {high:+.2f}]")
        texts.append(f"{t.labels.task(str(task))} (each over the one before): {', '.join(shown)}")
    if not parts:
        return not_measured("no perplexity task that all bit widths ran")
    found = _whole(t, "; ".join(texts), parts, CLAIMS["loss-grows"].bar)
    return found.lacking(t.not_evaluated("perplexity", order))


def _plain_schemes(t: Tables) -> tuple[list[str], list[str]]:
    """Returns the schemes of NUQ with 1 % outliers and of allocated codes, usual but for bits."""
    nuq, allocated = [], []
    for name, scheme in t.study.schemes.items():
        plain = scheme.model_copy(update={"label": None})
        if isinstance(scheme, NuqScheme):
            usual: SchemeSpec = NuqScheme(kind="nuq", bits=scheme.bits, outliers=0.01)
            nuq += [name] if plain == usual else []
        elif isinstance(scheme, AllocatedScheme):
            usual = AllocatedScheme(kind="allocated", bits=scheme.bits)
            allocated += [name] if plain == usual else []
    return nuq, allocated


def half_the_loss(t: Tables) -> Outcome:
    """Judges the loss of allocated codes over that of NUQ with as many bits, paired by seed."""
    nuq, allocated = _plain_schemes(t)
    rows = t.evaluations
    if not (nuq and allocated and len(rows)):
        return not_measured("needs NUQ with 1 % outliers and allocated codes")
    texts, parts = [], list[Part]()
    rows = rows[(rows.suite == "perplexity") & (rows.protocol == "B")]
    for task, group in rows.groupby("task", sort=False):
        bits = group.groupby("scheme").bits_per_element.mean()
        shown = []
        for theirs in sorted(set(nuq) & set(bits.index), key=lambda name: -bits[name]):
            fewer = [name for name in allocated if name in bits and bits[name] <= bits[theirs]]
            if not fewer:
                continue
            ours = max(fewer, key=lambda name: bits[name])
            spec = t.study
            found = loss_ratio(group, ours, theirs, spec.baseline, spec.statistics.alpha)
            if found is None:
                continue
            share = f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
            if found.lossless or not found.seeds:
                share = f"no ratio, as NUQ lost nothing in {found.lossless} of {found.seeds} seeds,"
            both = [t.labels.scheme(name) for name in (ours, theirs)]
            where, windows = t.labels.task(str(task)), int(group.samples.min())
            ends = found.low, found.high
            parts.append(Part(where, found.mean, ends, found.seeds, windows, *both))
            shown.append(f"{share} with {found.bits:.2f} for {found.other_bits:.2f} bits")
        if shown:
            texts.append(f"{t.labels.task(str(task))}: {', '.join(shown)}")
    if not parts:
        return not_measured("no perplexity, protocol B, of both at comparable bits")
    whole = _whole(t, "; ".join(texts), parts, CLAIMS["half-the-loss"].bar)
    return whole.lacking(t.not_evaluated("perplexity", [*nuq, *allocated], "B"))


def loss_on_7b(t: Tables) -> Outcome:
    """Judges whether the headline scheme's loss on Llama-2-7B stays under 0.1 perplexity."""
    rows = t.headline_tests("perplexity")
    rows = rows[rows.model.str.contains("llama-2-7b")] if len(rows) else rows
    if not len(rows):
        return not_measured("a claim about Llama-2-7B")
    row = rows.loc[rows.difference.idxmax()] if rows.difference.notna().any() else rows.iloc[0]
    ends = float(row.ci_low), float(row.ci_high)
    text = f"{t.labels.task(row.task)}: {row.difference:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"
    mine = t.evaluations[t.evaluations.scheme == t.study.headline]
    seeds = int(mine[mine.task.isin(rows.task)].groupby("task").seed.nunique().min())
    bar, alpha = CLAIMS["loss-on-7b"].bar, t.study.statistics.alpha
    found = Outcome(
        text,
        every(bar.met(*each) for each in zip(rows.ci_low, rows.ci_high, strict=True)),
        seeds,
        "seeds",
        seeds >= MIN_SEEDS,
        *(float(row.difference), *ends, f"{100 * (1 - alpha):g} % interval over {row.paired_by}s"),
        baseline=t.labels.scheme(t.study.baseline),
        workload=t.labels.task(row.task),
    )
    return found.lacking(t.not_evaluated("perplexity", [t.study.headline]))


def passkey(t: Tables) -> Outcome:
    """Judges whether the headline scheme is not worse on any passkey task."""
    rows = t.headline_tests("passkey")
    if not len(rows):
        return not_measured("no passkey task")
    parts = [
        f"{task}: {r['mean']:.1f} % for {r['baseline_mean']:.1f} %, {r['verdict']}"
        for task, r in zip(map(t.labels.task, rows.task), rows.to_dict("records"), strict=True)
    ]
    prompts = int(rows.sample_pairs.min())
    verdicts = list(rows.verdict)
    met = False if "worse" in verdicts else (True if set(verdicts) <= set(KEPT) else None)
    seeds = int(rows.pairs.min())
    row = rows.loc[rows.sample_difference.fillna(rows.difference).idxmin()]
    alpha = t.study.statistics.alpha
    found = Outcome(
        "; ".join(parts),
        met,
        prompts,
        f"prompts per task, {seeds} seeds",
        prompts >= MIN_PROMPTS and seeds >= MIN_SEEDS,
        value=float(row.sample_difference),
        low=float(row.sample_ci_low),
        high=float(row.sample_ci_high),
        interval=f"{100 * (1 - alpha):g} % interval over prompts",
        baseline=t.labels.scheme(t.study.baseline),
        workload=f"{t.labels.task(row.task)} (the worst of {len(rows)})",
    )
    return found.lacking(t.not_evaluated("passkey", [t.study.headline]))


def _long_random(t: Tables) -> pd.DataFrame:
    """Returns the caches of long random prompts in the section `kernels`, of the headline scheme.

    A cache's bytes depend on shapes and lengths, and on weights only by the number of outliers,
    for which room is allocated.
    """
    rows = t.kernels
    if "bits_per_element" in rows:
        rows = rows[(rows.side == t.study.headline) & (rows.tokens >= LONG)]
        return rows[rows.bits_per_element.notna()]
    return rows[:0]


def bits_per_element(t: Tables) -> Outcome:
    """Judges the bytes allocated over elements stored, for long prompts."""
    rows = t.evaluations[t.evaluations.scheme == t.study.headline]
    if not len(rows):
        return not_measured("the headline scheme is not evaluated")
    bits, lengths = 8 * rows.cache_bytes / rows.cache_elements, rows.tokens / rows.samples
    if lengths.max() < LONG and len(cases := _long_random(t)):
        count = cases.case.nunique()
        text = f"most of {count} cases with random weights, from 16K"
        return _most_bits(t, cases.bits_per_element, text, count, "cases", of_model=False)
    if lengths.max() < LONG:
        longest = int(lengths.max())
        most = bits[lengths == lengths.max()].max()
        return not_measured(
            f"the longest prompt has {longest:,} tokens ({most:.2f} bits); defined from 16K"
        )
    long = bits[lengths >= LONG]
    return _most_bits(t, long, f"most of {len(long)} results", len(long), "results")


def _most_bits(
    t: Tables, bits: pd.Series, text: str, count: int, of: str, *, of_model: bool = True
) -> Outcome:
    """Returns the outcome of the largest of some sizes, which are counted and not sampled."""
    least, most = float(bits.min()), float(bits.max())
    return Outcome(
        f"{most:.2f} ({text})",
        CLAIMS["bits-per-element"].bar.met(most, most),
        count,
        of,
        True,
        *(most, least, most, "least and most of all"),
        cache=t.labels.scheme(t.study.headline),
        workload=text,
        of_model=of_model,
    )
