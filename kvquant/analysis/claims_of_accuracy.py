"""Verdicts of the claims about accuracy and size: loss by bits, passkeys, bits per element."""

from __future__ import annotations

import pandas as pd

from kvquant.analysis.claim_list import MIN_PROMPTS, MIN_SEEDS
from kvquant.analysis.evidence import Outcome, against_bar, interval, not_measured
from kvquant.analysis.study_tables import Tables
from kvquant.study.schemes import AllocatedScheme, NuqScheme, SchemeSpec

LONG, MAX_BITS = 16_000, 3.6  # of the claim about size
KEPT = ("identical", "equivalent", "better", "better (within margin)", "worse (within margin)")


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
        parts.append(f"{t.labels.task(str(task))} (each over the one before): {', '.join(shown)}")
    if not parts:
        return not_measured("no perplexity task that all bit widths ran")
    whole = False if False in met else (None if None in met else True)
    return Outcome("; ".join(parts), whole, f"{min(seeds)} seeds", min(seeds) >= MIN_SEEDS)


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
    parts: list[str] = []
    met: list[bool | None] = []
    seeds: list[int] = []
    rows = rows[(rows.suite == "perplexity") & (rows.protocol == "B")]
    for task, group in rows.groupby("task", sort=False):
        values = group.pivot(index="seed", columns="scheme", values="value")
        bits = group.groupby("scheme").bits_per_element.mean()
        if t.study.baseline not in values:
            continue
        lost = values.sub(values[t.study.baseline], axis=0)
        shown = []
        for theirs in sorted(set(nuq) & set(lost), key=lambda name: -bits[name]):
            fewer = [name for name in allocated if name in lost and bits[name] <= bits[theirs]]
            if not fewer:
                continue
            ours = max(fewer, key=lambda name: bits[name])
            paired = lost[[ours, theirs]].dropna()
            seeds.append(len(paired))
            lossless = int((paired[theirs] <= 0).sum())
            if lossless or paired.empty:  # half of a gain is no bar, and its ratio has no sense
                met.append(None)
                share = f"no ratio, as NUQ lost nothing in {lossless} of {len(paired)} seeds,"
            else:
                ratios = (paired[ours] / paired[theirs]).to_numpy(dtype=float)
                low, high = interval(ratios, t.study.statistics.alpha)
                met.append(against_bar(low, high, 0.5, at_most=True))
                share = f"{ratios.mean():.2f} [{low:.2f}, {high:.2f}]"
            shown.append(f"{share} with {bits[ours]:.2f} for {bits[theirs]:.2f} bits")
        if shown:
            parts.append(f"{t.labels.task(str(task))}: {', '.join(shown)}")
    if not parts:
        return not_measured("no perplexity, protocol B, of both at comparable bits")
    whole = False if False in met else (None if None in met else True)
    return Outcome("; ".join(parts), whole, f"{min(seeds)} seeds", min(seeds) >= MIN_SEEDS)


def loss_on_7b(t: Tables) -> Outcome:
    """Judges whether the headline scheme's loss on Llama-2-7B stays under 0.1 perplexity."""
    rows = t.headline_tests("perplexity")
    rows = rows[rows.model.str.contains("llama-2-7b")] if len(rows) else rows
    if not len(rows):
        return not_measured("a claim about Llama-2-7B")
    row = rows.loc[rows.difference.idxmax()] if rows.difference.notna().any() else rows.iloc[0]
    met = against_bar(row.ci_low, row.ci_high, 0.1, at_most=True)
    seeds = int(rows.pairs.min())
    value = (
        f"{t.labels.task(row.task)}: {row.difference:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
    )
    return Outcome(value, met, f"{seeds} seeds", seeds >= MIN_SEEDS)


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
    enough = prompts >= MIN_PROMPTS and int(rows.pairs.min()) >= MIN_SEEDS
    return Outcome("; ".join(parts), met, f"{prompts} prompts per task", enough)


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
        most = float(cases.bits_per_element.max())
        value = f"{most:.2f} (most of {cases.case.nunique()} cases with random weights, from 16K)"
        met = against_bar(most, most, MAX_BITS, at_most=True)
        return Outcome(value, met, "allocated bytes", of_model=False)
    if lengths.max() < LONG:
        longest = int(lengths.max())
        most = bits[lengths == lengths.max()].max()
        return not_measured(
            f"the longest prompt has {longest:,} tokens ({most:.2f} bits); defined from 16K"
        )
    long = bits[lengths >= LONG]
    value = f"{long.max():.2f} (most of {len(long)} results)"
    return Outcome(
        value, against_bar(long.max(), long.max(), MAX_BITS, at_most=True), "allocated bytes"
    )
