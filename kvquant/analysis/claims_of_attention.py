"""Verdicts of the claims about 8-bit attention of prompts: what it costs, and what it gives.

They separate arithmetic from storage: each compares a cache with itself, with 16-bit attention, or
8-bit attention over 16 bits with an 8-bit cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd

from kvquant.analysis.bars import Bar
from kvquant.analysis.claim_list import CLAIMS, LONG_PROMPT, MIN_SEEDS, MIN_TRIALS
from kvquant.analysis.claims_of_jobs import outcome_of_trials, ratio_in_words
from kvquant.analysis.evidence import (
    ROUNDS,
    TRIALS,
    Outcome,
    every,
    interval,
    no_record,
    not_measured,
    over_seeds,
)
from kvquant.analysis.labels import device_label, job_label
from kvquant.analysis.study_tables import Tables
from kvquant.study.jobs import JobCase
from kvquant.study.schemes import Fp8Scheme


def divergence(t: Tables) -> Outcome:
    """Judges the mean KL divergence of 8-bit attention over that of an FP8 cache, by seed."""
    bar = CLAIMS["attention-loss"].bar
    schemes = t.study.schemes
    ours = [n for n in schemes if t.study.sixteen_bit_twin(n) == t.study.baseline]
    theirs = [
        n for n, s in schemes.items() if isinstance(s, Fp8Scheme) and s.prompt_attention == "16-bit"
    ]
    found: list[tuple[float, tuple[float, float], int, str]] = []
    rows = t.evaluations
    if ours and theirs and "kl" in rows:
        language = rows[(rows.suite == "perplexity") & (rows.protocol == "B")]
        for task, group in language.groupby("task", sort=False):
            kl = group.pivot_table(index="seed", columns="scheme", values="kl")
            if ours[0] not in kl or theirs[0] not in kl:
                continue
            ratios = (kl[ours[0]] / kl[theirs[0]]).dropna().to_numpy(dtype=float)
            if ratios.size:
                ends = interval(ratios, t.study.statistics.alpha)
                name = t.labels.task(str(task))
                found.append((float(ratios.mean()), ends, ratios.size, name))
    if not found:
        return not_measured("needs divergences of 8-bit attention and of an FP8 cache on one task")
    known = [part for part in found if part[1][0] == part[1][0]] or found
    value, ends, seeds, task = max(known, key=lambda part: bar.worst(part[1]))
    shown = "; ".join(f"{part[0]:.3f} on {part[3]}" for part in found)
    outcome = Outcome(
        shown,
        every(bar.met(*part[1]) for part in found),
        seeds,
        "seeds",
        min(part[2] for part in found) >= MIN_SEEDS,
        *(value, *ends, over_seeds(t.study.statistics.alpha)),
        cache=t.labels.scheme(ours[0]),
        baseline=t.labels.scheme(theirs[0]),
        workload=task + ("" if len(found) == 1 else f" (the worst of {len(found)})"),
    )
    return outcome.lacking(t.not_evaluated("perplexity", [ours[0], theirs[0]], "B"))


def _pairs(
    t: Tables, metered: bool
) -> Iterator[tuple[JobCase, str, pd.Series | None, pd.Series | None]]:
    """Yields the cases of long prompts with a scheme of 8-bit attention, its row and its twin's.

    A row is None where nothing was measured, or memory ran out.

    Args:
        t: The tables.
        metered: Whether only cases count whose energy is measured.
    """
    for name, case in t.study.job_cases().items():
        if case.prompt < LONG_PROMPT or not case.given_prompts or not len(t.jobs):
            continue
        if metered and not case.energy:
            continue
        rows = t.jobs[(t.jobs.case == name) & (t.jobs.status == "ok")].set_index(
            "scheme", drop=False
        )
        for scheme in case.schemes:
            twin = t.study.sixteen_bit_twin(scheme)
            if twin in case.schemes:
                both = [rows.loc[s] if s in rows.index else None for s in (scheme, twin)]
                yield case, scheme, both[0], both[1]


def _worst(
    t: Tables, column: str, ends: tuple[str, str], bar: Bar, kind: str, *, faster: bool
) -> Outcome:
    """Returns the outcome of the worst case: 8 over 16 bits, or 16 over 8 where time counts.

    Args:
        t: The tables.
        column: What is compared.
        ends: The columns of its lower and its upper end.
        bar: The bar.
        kind: What the ends are.
        faster: Whether the ratio is 16-bit over 8-bit attention.
    """
    found, lacking = [], []
    for case, scheme, ours, theirs in _pairs(t, column.startswith("joules")):
        if ours is None or theirs is None:
            lacking.append(f"{job_label(case)}, {t.labels.scheme(scheme)}")
            continue
        if column.startswith("joules") and ours.source != "nvml":
            return not_measured("an estimate without counters")
        over, under = (theirs, ours) if faster else (ours, theirs)
        low, high = over[ends[0]] / under[ends[1]], over[ends[1]] / under[ends[0]]
        ratio = float(over[column] / under[column]), float(low), float(high)
        found.append((ratio, case, ours, theirs))
    if not found:
        return no_record("jobs")
    known = [part for part in found if part[0][0] == part[0][0]] or found
    ratio, case, ours, theirs = max(known, key=lambda part: bar.worst(part[0][1:]))
    where = job_label(case)
    names = [t.labels.scheme(str(side.scheme)) for side in (ours, theirs)]
    told = f"{where}: {names[0]} against {names[1]}, on {device_label(str(ours.device))}"
    text = ratio_in_words(*ratio, told)
    outcome = replace(
        outcome_of_trials(t, ours, theirs, ratio, where, bar, text),
        met=every(bar.met(*part[0][1:]) for part in found),
        enough=min(min(part[2].trials, part[3].trials) for part in found) >= MIN_TRIALS,
        interval=kind,
    )
    return outcome.lacking(lacking)


def speed(t: Tables) -> Outcome:
    """Judges the speed of long prompts with 8-bit over that with 16-bit attention."""
    ends = ("first_token_ms_p10", "first_token_ms_p90")
    bar = CLAIMS["attention-speed"].bar
    return _worst(t, "first_token_ms_median", ends, bar, ROUNDS, faster=True)


def energy(t: Tables) -> Outcome:
    """Judges the energy per prompt token with 8-bit over that with 16-bit attention."""
    column = "joules_per_prompt_token"
    ends = (f"{column}_low", f"{column}_high")
    return _worst(t, column, ends, CLAIMS["attention-energy"].bar, TRIALS, faster=False)
