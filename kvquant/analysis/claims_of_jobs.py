"""Verdicts of the claims about whole jobs: what fits in memory, their speed and their energy.

Every ratio is of the headline scheme, or in a case without it of its first quantized cache, over
the 16-bit cache of the case that is best, growing or static. Its interval spans the worst and the
best trials of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pandas as pd

from kvquant.analysis.bars import Bar
from kvquant.analysis.claim_list import CLAIMS, MIN_REPEATS, MIN_ROUNDS, MIN_TRIALS
from kvquant.analysis.evidence import TRIALS, Outcome, every, no_record, not_measured
from kvquant.analysis.labels import device_label, job_label
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


def _too_large(t: Tables, fits: Callable[[JobCase], bool]) -> Outcome | None:
    """Returns the outcome where a case fits with a 16-bit cache and not with ours, else None."""
    for name, case in t.study.job_cases().items():
        if not len(t.jobs) or not fits(case) or name not in set(t.jobs.case):
            continue
        ours, base = t.job_sides(name)
        if ours is None and len(base):
            return _out_of_memory(case)
    return None


def _out_of_memory(case: JobCase) -> Outcome:
    told = f"out of memory with the quantized cache ({job_label(case)})"
    return Outcome(told, False, 1, "case", workload=job_label(case))


def _no_pair(t: Tables, fits: Callable[[JobCase], bool]) -> Outcome:
    """Returns the outcome where no case has times of both caches."""
    for name, case in t.study.job_cases().items():
        rows = t.jobs[t.jobs.case == name] if len(t.jobs) and fits(case) else t.jobs[:0]
        if not len(rows):
            continue
        ours, _ = t.job_sides(name)
        if ours is None:
            return _out_of_memory(case)
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


def ratio_in_words(value: float, low: float, high: float, what: str) -> str:
    """Returns a ratio with its ends and what it is of."""
    return f"{value:.3f} [{low:.3f}, {high:.3f}] ({what})"


def _who(t: Tables, ours: pd.Series, base: pd.Series) -> str:
    """Returns which caches were measured on which device."""
    both = [t.labels.scheme(str(row.scheme)) for row in (ours, base)]
    return f"{both[0]} over {both[1]}, on {device_label(str(ours.device))}"


def outcome_of_trials(
    t: Tables, ours: pd.Series, base: pd.Series, ratio: tuple[float, float, float], where: str,
    bar: Bar, text: str,
) -> Outcome:  # fmt: skip
    """Returns the outcome of a ratio that rests on trials."""
    fewest = int(min(ours.trials, base.trials))
    return Outcome(
        text,
        bar.met(*ratio[1:]),
        fewest,
        "trials in turns",
        fewest >= MIN_TRIALS,
        *(*ratio, TRIALS),
        cache=t.labels.scheme(str(ours.scheme)),
        baseline=t.labels.scheme(str(base.scheme)),
        workload=where,
        device=str(ours.device),
    )


def capacity(t: Tables) -> Outcome:
    """Judges the tokens that were held at once in a budget of memory, over fp16."""
    if failed := _too_large(t, _budgeted):
        return failed
    for case, ours, base in _cases(t, _budgeted):
        best = base.loc[base.capacity_tokens.idxmax()]
        value = float(ours.capacity_tokens / best.capacity_tokens)
        told = (
            f"{value:.2f}: {int(ours.capacity_tokens):,} tokens over {int(best.capacity_tokens):,} "
            f"({_who(t, ours, best)})"
        )
        # a search stops below what would fit by less than its step
        step = max(1, case.prompt // 64)
        low = float(ours.capacity_tokens / (best.capacity_tokens + step))
        high = float((ours.capacity_tokens + step) / best.capacity_tokens)
        kind = f"step of the search, {step:,} tokens"
        found = outcome_of_trials(
            t, ours, best, (value, low, high), job_label(case), CLAIMS["capacity"].bar, told
        )
        return replace(found, n=1, n_of="search of each cache", enough=True, interval=kind)
    return _no_pair(t, _budgeted)


def speed(t: Tables) -> Outcome:
    """Judges the tokens per second of whole jobs in a budget of memory, over fp16."""
    if failed := _too_large(t, _in_budget):
        return failed
    for case, ours, base in _cases(t, _in_budget):
        best = base.loc[base.job_tokens_per_s.idxmax()]
        ratio = _ratio(ours, best, "job_tokens_per_s")
        batches = f"{int(ours.batch_size)} prompts against {int(best.batch_size)}"
        told = ratio_in_words(*ratio, f"{job_label(case)}: {_who(t, ours, best)}, {batches}")
        where = f"{job_label(case)}, {batches}"
        return outcome_of_trials(t, ours, best, ratio, where, CLAIMS["job-speed"].bar, told)
    return _no_pair(t, _in_budget)


def _joules(t: Tables, column: str, bar: Bar) -> Outcome:
    """Judges an energy over fp16 in the first case in a budget that counters measured."""
    if failed := _too_large(t, _metered):
        return failed
    for case, ours, base in _cases(t, _metered):
        if ours.source != "nvml":
            return not_measured("an estimate without counters")
        best = base.loc[base[column].idxmin()]
        ratio = _ratio(ours, best, column)
        told = ratio_in_words(*ratio, f"{job_label(case)}: {_who(t, ours, best)}")
        return outcome_of_trials(t, ours, best, ratio, job_label(case), bar, told)
    return _no_pair(t, _metered)


def energy(t: Tables) -> Outcome:
    """Judges the energy per prompt and answer token of whole jobs in a budget, over fp16."""
    return _joules(t, "joules_per_token", CLAIMS["job-energy"].bar)


def prefill_energy(t: Tables) -> Outcome:
    """Judges the energy per prompt token of the same jobs' prefill, over fp16."""
    return _joules(t, "joules_per_prompt_token", CLAIMS["prefill-energy"].bar)


def generate(t: Tables) -> Outcome:
    """Judges decoding by transformers' generate on the worst case, over the growing fp16 cache."""
    if failed := _too_large(t, _generated):
        return failed
    found = []
    for case, ours, base in _cases(t, _generated):
        growing = base[base.scheme == t.study.baseline]
        if len(growing):
            theirs = growing.iloc[0]
            value, low, high = _ratio(ours, theirs, "decode_tokens_per_s")
            # few trials of many steps: the steps' spread counts as well
            low = min(low, float(theirs.step_ms_p10 / ours.step_ms_p90))
            high = max(high, float(theirs.step_ms_p90 / ours.step_ms_p10))
            ratio = value, low, high
            found.append((ratio, job_label(case), ours, theirs))
    if not found:
        return _no_pair(t, _generated)
    ratio, name, ours, theirs = min(found, key=lambda case: case[0][0])
    steps, trials = _fewest(ours, theirs)
    bar = CLAIMS["generate-speed"].bar
    text = ratio_in_words(*ratio, f"{name}: {_who(t, ours, theirs)}")
    outcome = replace(
        outcome_of_trials(t, ours, theirs, ratio, name, bar, text),
        met=every(bar.met(*part[0][1:]) for part in found),
        n=steps,
        n_of=f"steps in {trials} trials",
        enough=all(
            least >= wanted
            for part in found
            for least, wanted in zip(_fewest(*part[2:]), (MIN_ROUNDS, MIN_REPEATS), strict=True)
        ),
        interval="range of trials and 10th to 90th percentile of steps",
    )
    return outcome.lacking(not_measured_cases(t, _generated))


def _fewest(ours: pd.Series, theirs: pd.Series) -> tuple[int, int]:
    """Returns the steps and the trials of the side that has fewer."""
    steps, trials = (int(min(ours[key], theirs[key])) for key in ("step_ms_n", "trials"))
    return steps, trials


def not_measured_cases(t: Tables, fits: Callable[[JobCase], bool]) -> list[str]:
    """Returns the names of the cases that a claim is about and that have no record yet."""
    cases = t.study.job_cases().items()
    return [job_label(case) for name, case in cases if fits(case) and name not in set(t.jobs.case)]
