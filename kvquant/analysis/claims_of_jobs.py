"""Verdicts of the claims about whole jobs: what fits in memory, their speed and their energy.

Every ratio is of the headline scheme, or in a case without it of its first quantized cache, over
the 16-bit cache of the case that is best, growing or static. Its interval spans the worst and the
best trials of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from kvquant.analysis.claim_list import MIN_REPEATS, MIN_ROUNDS, MIN_TRIALS
from kvquant.analysis.evidence import Outcome, against_bar, no_record, not_measured
from kvquant.analysis.labels import job_label
from kvquant.analysis.study_tables import Tables
from kvquant.study.jobs import JobCase

BUDGET_GB, SHAPE = 40, "7b-mha"  # of the claims


def _cases(
    t: Tables, fits: Callable[[JobCase], bool]
) -> Iterator[tuple[JobCase, pd.Series, pd.DataFrame]]:
    """Yields each measured case that a claim is about, with our row and those of fp16 caches."""
    for name, case in t.study.job_cases().items():
        if not len(t.jobs) or not fits(case):
            continue
        ours, base = t.job_sides(name)
        if ours is not None and len(base):
            yield case, ours, base


def _no_pair(t: Tables, fits: Callable[[JobCase], bool]) -> Outcome:
    """Returns the outcome where no case has times of both caches."""
    for name, case in t.study.job_cases().items():
        rows = t.jobs[t.jobs.case == name] if len(t.jobs) and fits(case) else t.jobs[:0]
        if not len(rows):
            continue
        ours, _ = t.job_sides(name)
        if ours is None:
            told = f"out of memory with the quantized cache ({job_label(case)})"
            return Outcome(told, False, "1 case")
        return not_measured(f"out of memory with every 16-bit cache ({job_label(case)}): no ratio")
    return no_record("jobs")


def _budgeted(case: JobCase) -> bool:
    return _in_budget(case) and case.capacity


def _metered(case: JobCase) -> bool:
    return _in_budget(case) and case.energy


def _generated(case: JobCase) -> bool:
    return case.decode == "generate" and case.num_gpus == 1


def _in_budget(case: JobCase) -> bool:
    return case.memory_gb == BUDGET_GB and case.shape == SHAPE and case.num_gpus == 1


def _ratio(ours: pd.Series, base: pd.Series, column: str) -> tuple[float, float, float]:
    """Returns our value over that of a baseline, with the lowest and highest ratio of trials."""
    low = float(ours[f"{column}_low"] / base[f"{column}_high"])
    high = float(ours[f"{column}_high"] / base[f"{column}_low"])
    return float(ours[column] / base[column]), low, high


def _text(value: float, low: float, high: float, what: str) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}] ({what})"


def _who(t: Tables, ours: pd.Series, base: pd.Series) -> str:
    """Returns which caches were measured on which device."""
    both = [t.labels.scheme(str(row.scheme)) for row in (ours, base)]
    return f"{both[0]} over {both[1]}, on {ours.device}"


def _trials(ours: pd.Series, base: pd.Series) -> tuple[str, bool]:
    """Returns the evidence of a claim that rests on trials, and whether it suffices."""
    fewest = int(min(ours.trials, base.trials))
    return f"{fewest} trials in turns", fewest >= MIN_TRIALS


def capacity(t: Tables) -> Outcome:
    """Judges the tokens that were held at once in a budget of memory, over fp16."""
    for case, ours, base in _cases(t, _budgeted):
        best = base.loc[base.capacity_tokens.idxmax()]
        value = float(ours.capacity_tokens / best.capacity_tokens)
        told = (
            f"{value:.2f}: {int(ours.capacity_tokens):,} tokens over {int(best.capacity_tokens):,} "
            f"({_who(t, ours, best)})"
        )
        step = max(1, case.prompt // 64)
        met = against_bar(value, value, 4.0, at_most=False)
        return Outcome(told, met, f"searched in steps of {step:,} tokens")
    return _no_pair(t, _budgeted)


def speed(t: Tables) -> Outcome:
    """Judges the tokens per second of whole jobs in a budget of memory, over fp16."""
    for case, ours, base in _cases(t, _in_budget):
        best = base.loc[base.job_tokens_per_s.idxmax()]
        value, low, high = _ratio(ours, best, "job_tokens_per_s")
        batches = f"{int(ours.batch_size)} prompts against {int(best.batch_size)}"
        told = _text(value, low, high, f"{job_label(case)}: {_who(t, ours, best)}, {batches}")
        return Outcome(told, against_bar(low, high, 2.5, at_most=False), *_trials(ours, best))
    return _no_pair(t, _in_budget)


def _joules(t: Tables, column: str, judge: Callable[[float, float], bool | None]) -> Outcome:
    """Judges an energy over fp16 in the first case in a budget that counters measured."""
    for case, ours, base in _cases(t, _metered):
        if ours.source != "nvml":
            return not_measured("an estimate without counters")
        best = base.loc[base[column].idxmin()]
        value, low, high = _ratio(ours, best, column)
        told = _text(value, low, high, f"{job_label(case)}: {_who(t, ours, best)}")
        return Outcome(told, judge(low, high), *_trials(ours, best))
    return _no_pair(t, _metered)


def energy(t: Tables) -> Outcome:
    """Judges the energy per prompt and answer token of whole jobs in a budget, over fp16."""
    return _joules(
        t, "joules_per_token", lambda low, high: against_bar(low, high, 0.55, at_most=True)
    )


def prefill_energy(t: Tables) -> Outcome:
    """Judges the energy per prompt token of the same jobs' prefill, over fp16."""
    return _joules(
        t,
        "joules_per_prompt_token",
        lambda low, high: against_bar(low, high, 1.03, at_most=True),
    )


def generate(t: Tables) -> Outcome:
    """Judges decoding by transformers' generate on the worst case, over the growing fp16 cache."""
    found = []
    for case, ours, base in _cases(t, _generated):
        growing = base[base.scheme == t.study.baseline]
        if len(growing):
            theirs = growing.iloc[0]
            ratio = _ratio(ours, theirs, "decode_tokens_per_s")
            found.append((*ratio, job_label(case), ours, theirs))
    if not found:
        return _no_pair(t, _generated)
    value, low, high, name, ours, theirs = min(found, key=lambda case: case[0])
    steps, trials = (int(min(ours[key], theirs[key])) for key in ("step_ms_n", "trials"))
    return Outcome(
        _text(value, low, high, f"{name}: {_who(t, ours, theirs)}"),
        against_bar(low, high, 1.0, at_most=False),
        f"{trials} trials, {steps} steps",
        trials >= MIN_REPEATS and steps >= MIN_ROUNDS,
    )
