"""Verdicts of the claims about cost: prefill, quantization, energy and appended tokens."""

from __future__ import annotations

import pandas as pd

from kvquant.analysis.claim_list import MIN_ROUNDS, MIN_TRIALS
from kvquant.analysis.evidence import Outcome, against_bar, no_record, not_measured
from kvquant.analysis.labels import case_label
from kvquant.analysis.pareto import counted
from kvquant.analysis.study_tables import Tables

PREFILL, OVER_REFERENCE = 0.98, 3.0  # bars of the claims about prefill: least speed over another's


def _worst(rows: pd.DataFrame, column: str, *, largest: bool) -> tuple[str, pd.DataFrame]:
    """Returns the workload whose median over repetitions is worst, and its rows with a value."""
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
    """Returns the evidence of a timed claim, and whether it suffices."""
    fewest, reps = int(rows.scheme_rounds.min()), len(rows)
    what = f"{reps} repetition{'s' * (reps > 1)} of {fewest} rounds or more"
    return f"{what} on {rows['device'].iloc[0]}", fewest >= MIN_ROUNDS


def _of_kernels(t: Tables, sides: list[str], bar: float) -> Outcome:
    """Judges our prefill over another cache's from the section `kernels`, on its worst workload.

    Cases of one shape and length are repetitions. Few have several, so the interval spans the 10th
    to 90th percentiles of rounds.

    Args:
        t: The tables.
        sides: The schemes of the other cache.
        bar: The least ratio of the claim.
    """
    rows = t.kernels
    if len(rows):
        rows = rows[(rows.scheme == t.study.headline) & (rows.measure == "prefill")]
        rows = rows[rows.side.isin(sides) & rows.over_ours_median.notna()]
    if not len(rows):
        return not_measured("not measured yet (sections 'throughput' and 'kernels': no record)")
    names = [
        case_label(str(r.shape), int(r.batch), int(r.tokens), int(r.all_tokens))
        for r in rows[["shape", "batch", "tokens", "all_tokens"]].itertuples()
    ]
    rows = rows.assign(workload=names)
    name, worst = _worst(rows, "over_ours_median", largest=False)
    middle = float(worst.over_ours_median.median())
    low, high = float(worst.over_ours_p10.min()), float(worst.over_ours_p90.max())
    where = f"{name}, random weights, the worst workload"
    value = f"{middle:.3f} [{low:.3f}, {high:.3f}] ({where})"
    if not t.on_gpu:
        return not_measured(f"{value} on {worst['device'].iloc[0]}; defined for a GPU")
    met = against_bar(low, high, bar, at_most=False)
    evidence, enough = _rounds(worst.assign(scheme_rounds=worst.over_ours_n))
    return Outcome(value, met, evidence, enough, of_model=False)


def prefill(t: Tables) -> Outcome:
    """Judges the headline scheme's prefill on its worst workload, over the baseline."""
    rows = t.headline_perf() if len(t.perf) else t.perf
    if not len(rows) or rows["prefill_ratio"].isna().all():
        return _of_kernels(t, [t.study.baseline], PREFILL)
    name, worst = _worst(rows, "prefill_ratio", largest=False)
    value = f"{_spread(worst, 'prefill_ratio')} ({t.labels.timed[name]}, the worst workload)"
    if not t.on_gpu:
        return not_measured(f"{value} on {worst['device'].iloc[0]}; defined for a GPU")
    ratio = worst.prefill_ratio
    met = against_bar(ratio.min(), ratio.max(), PREFILL, at_most=False)
    return Outcome(value, met, *_rounds(worst))


def quantize_share(t: Tables) -> Outcome:
    """Judges quantization as a share of the baseline's prefill, on the worst workload."""
    rows = t.headline_perf() if len(t.perf) else t.perf
    if not len(rows) or rows["quantize_share"].isna().all():
        return no_record("throughput")
    name, worst = _worst(rows, "quantize_share", largest=True)
    share = worst.quantize_share
    met = against_bar(share.min(), share.max(), 0.15, at_most=True)
    where = f"({t.labels.timed[name]}, the worst workload)"
    value = f"{_spread(worst, 'quantize_share')} of the prefill {where}"
    return Outcome(value, met, *_rounds(worst))


def energy(t: Tables) -> Outcome:
    """Judges the headline scheme's measured energy on its worst workload, over the baseline."""
    rows = t.energy[t.energy["scheme"] == t.study.headline] if len(t.energy) else t.energy
    if not len(rows):
        return no_record("energy")
    measured = counted(rows)
    if not len(measured) or measured["energy_ratio"].isna().all():
        return not_measured("an estimate without counters")
    name, worst = _worst(measured, "energy_ratio", largest=True)
    ratio, trials = worst.energy_ratio, int(worst.scheme_trials.min())
    met = against_bar(ratio.min(), ratio.max(), 0.55, at_most=True)
    evidence = f"{len(worst)} x {trials} trials on {worst['device'].iloc[0]}"
    return Outcome(
        f"{_spread(worst, 'energy_ratio')} ({t.labels.metered[name]})",
        met,
        evidence,
        trials >= MIN_TRIALS,
    )


def append_growth(points: pd.DataFrame, series: str) -> tuple[float, int, int] | None:
    """Returns the cost of a token, one per call, at the largest size over that at the smallest.

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


def append(t: Tables) -> Outcome:
    """Judges the cost of an appended token at the largest cache over that at the smallest."""
    ours = append_growth(t.append, t.study.headline)
    if ours is None:
        return no_record("append")
    theirs = append_growth(t.append, "concatenation")
    beside = f"; {theirs[0]:.2f} where arrays are concatenated" if theirs else ""
    value = f"{ours[0]:.2f} from {ours[1]:,} to {ours[2]:,} tokens{beside}"
    if ours[2] < 128 * ours[1]:
        return not_measured(f"{value}; defined from 1K to 128K")
    mine = t.append[t.append.series == t.study.headline]
    rounds = int(mine.token_ms_n.min())
    met = against_bar(ours[0], ours[0], 1.2, at_most=True)
    evidence = f"{rounds} rounds or more on {mine['device'].iloc[0]}"
    return Outcome(value, met, evidence, rounds >= MIN_ROUNDS)


def over_reference(t: Tables) -> Outcome:
    """Judges prefill over KVQuant's procedure on one workload, both against the same baseline."""
    names = [n for n, s in t.study.schemes.items() if s.kind == "kvquant-ref"]
    theirs = t.perf[t.perf["scheme"].isin(names)] if len(t.perf) else t.perf
    ours = t.headline_perf() if len(t.perf) else t.perf
    if not len(theirs) or not len(ours):
        return _of_kernels(t, names, OVER_REFERENCE)
    both = ours.merge(theirs, on=["workload", "rep"], suffixes=("", "_ref"))
    both = both.assign(speed=both.prefill_ratio / both.prefill_ratio_ref)
    if both.speed.isna().all():
        return not_measured("no workload that both ran")
    name, worst = _worst(both, "speed", largest=False)
    value = f"{_spread(worst, 'speed')} ({t.labels.timed[name]}, the worst workload)"
    if not t.on_gpu:
        return not_measured(f"{value}; defined for a GPU")
    met = against_bar(worst.speed.min(), worst.speed.max(), OVER_REFERENCE, at_most=False)
    return Outcome(value, met, *_rounds(worst))
