"""Verdicts of the claims about cost: prefill, quantization, energy and appended tokens.

Ends of a ratio of times span the 10th to 90th percentile of the rounds of all repetitions, those of
joules the trials of all repetitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from kvquant.analysis.bars import Bar
from kvquant.analysis.claim_list import CLAIMS, MIN_ROUNDS, MIN_TRIALS
from kvquant.analysis.evidence import ROUNDS, Outcome, every, no_record, not_measured
from kvquant.analysis.labels import case_label, device_label
from kvquant.analysis.pareto import counted
from kvquant.analysis.study_tables import Tables


def _worst(rows: pd.DataFrame, *, largest: bool) -> tuple[str, pd.DataFrame]:
    """Returns the workload whose median value over repetitions is worst, and its rows."""
    rows = rows[rows.value.notna()]
    medians = rows.groupby("workload").value.median()
    name = str(medians.idxmax() if largest else medians.idxmin())
    return name, rows[rows.workload == name]


def _valued(rows: pd.DataFrame, column: str, low: pd.Series, high: pd.Series) -> pd.DataFrame:
    """Returns rows with `value` and its ends, which never leave the value outside."""
    value = rows[column].astype(float)
    ends = pd.DataFrame({"value": value, "low": low.fillna(value), "high": high.fillna(value)})
    return rows.assign(value=value, low=ends.min(axis=1), high=ends.max(axis=1))


def _speeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns rows of `perf` with the ratio of prefill speeds and its ends over rounds."""
    base = rows.base_prefill_ms_median.astype(float)
    low, high = (base / rows[f"scheme_prefill_ms_{p}"].astype(float) for p in ("p90", "p10"))
    return _valued(rows, "prefill_ratio", low, high)


def _outcome(
    t: Tables, rows: pd.DataFrame, worst: pd.DataFrame, where: str, bar: Bar, kind: str, n: str,
    of: str, least: int, **more: str,
) -> Outcome:  # fmt: skip
    """Returns the outcome of the worst workload, over all of its repetitions.

    It meets the bar where the others do, too, and rests on enough where they do.

    Args:
        t: The tables.
        rows: The rows of all workloads, a repetition each, with `value`, `low` and `high`.
        worst: Those of the worst workload.
        where: Its name.
        bar: The claim's.
        kind: What the ends are.
        n: The column of a repetition's rounds or trials, of which the fewest count.
        of: What `n` counts.
        least: The claim's minimum of them.
        more: Names for the outcome.
    """
    value, low, high = float(worst.value.median()), float(worst.low.min()), float(worst.high.max())
    known = rows[rows.value.notna()]
    met = [bar.met(part.low.min(), part.high.max()) for _, part in known.groupby("workload")]
    reps = f" in each of {len(worst)} repetitions" if len(worst) > 1 else ""
    return Outcome(
        f"{value:.3f} [{low:.3f}, {high:.3f}] ({where}, the worst workload)",
        every(met),
        int(worst[n].min()),
        f"{of}{reps}",
        bool(known[n].min() >= least),
        *(value, low, high, kind),
        cache=t.labels.scheme(t.study.headline),
        workload=f"{where} (the worst)",
        device=str(worst["device"].iloc[0]),
        **more,  # type: ignore[arg-type]
    )


def _of_kernels(t: Tables, sides: list[str], bar: Bar) -> Outcome:
    """Judges our prefill over another cache's from the section `kernels`, on its worst workload.

    Cases of one shape and length are repetitions.

    Args:
        t: The tables.
        sides: The schemes of the other cache.
        bar: The bar of the claim.
    """
    rows = t.kernels
    if len(rows):
        rows = rows[(rows.scheme == t.study.headline) & (rows.measure == "prefill")]
        rows = rows.assign(workload=_shapes(rows))
        if len(failed := _without_ours(rows, sides)):
            found = replace(_failed(failed), of_model=False)
            return _for_a_gpu(t, found)
        rows = rows[rows.side.isin(sides) & rows.over_ours_median.notna()]
    if not len(rows):
        return not_measured("not measured yet (sections 'throughput' and 'kernels': no record)")
    low, high = rows.over_ours_p10.astype(float), rows.over_ours_p90.astype(float)
    rows = _valued(rows, "over_ours_median", low, high)
    name, worst = _worst(rows, largest=False)
    found = _outcome(
        t, rows, worst, f"{name}, random weights", bar, ROUNDS, "over_ours_n", "rounds", MIN_ROUNDS,
        baseline=t.labels.scheme(str(worst.side.iloc[0])),
    )  # fmt: skip
    found = replace(found, of_model=False)
    asked = {
        name
        for name, case in t.study.kernel_cases().items()
        if (case.scheme or t.study.headline) == t.study.headline
        and "prefill" in case.measure
        and {t.study.baseline, *case.peers} & set(sides)
    }
    return _for_a_gpu(t, found).lacking(sorted(asked - set(t.kernels.case)))


def _shapes(rows: pd.DataFrame) -> list[str]:
    """Returns the names of the shapes and lengths of rows of `kernels`."""
    return [
        case_label(str(r.shape), int(r.batch), int(r.tokens), int(r.all_tokens))
        for r in rows[["shape", "batch", "tokens", "all_tokens"]].itertuples()
    ]


def _without_ours(rows: pd.DataFrame, sides: list[str]) -> pd.DataFrame:
    """Returns the rows of other caches in the cases that our cache alone did not finish."""
    if "role" not in rows:
        return rows[:0]
    ours = set(rows[(rows.role == "ours") & (rows.status != "ok")].case)
    return rows[rows.side.isin(sides) & (rows.status == "ok") & rows.case.isin(ours)]


def _not_there(
    t: Tables,
    cells: list[tuple[str, str, int]],
    there: set[tuple[str, int]],
    names: Mapping[str, str],
) -> list[str]:
    """Returns the names of the headline scheme's workloads of which a repetition is not there."""
    asked = [(workload, rep) for scheme, workload, rep in cells if scheme == t.study.headline]
    return list(dict.fromkeys(names[cell[0]] for cell in asked if cell not in there))


def _not_timed(t: Tables, rows: pd.DataFrame) -> list[str]:
    """Returns the names of the workloads of throughput that some rows of `perf` lack."""
    there = set(zip(rows.workload, rows.rep, strict=True))
    return _not_there(t, t.study.throughput_cells(), there, t.labels.timed)


def _too_large(rows: pd.DataFrame, other: str = "base_status") -> pd.Series:
    """Returns which rows of `perf` ran out of memory with our cache, and not with the other one."""
    if "scheme_status" not in rows:
        return pd.Series(False, rows.index)
    return (rows.scheme_status != "ok") & (rows[other] == "ok")


def _failed(rows: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Outcome:
    """Returns the outcome of workloads that fit in memory with the other cache alone.

    Args:
        rows: A row of each.
        labels: Their names; None: as they are.
    """
    names = ", ".join((labels or {}).get(name, name) for name in rows.workload.unique())
    told, device = f"out of memory with the quantized cache ({names})", str(rows.device.iloc[0])
    count = rows.workload.nunique()
    return Outcome(told, False, count, "workloads", workload=names, device=device)


def _for_a_gpu(t: Tables, found: Outcome) -> Outcome:
    """Returns the outcome of a claim about GPUs, which no other device settles."""
    if t.on_gpu:
        return found
    return not_measured(f"{found.measured} on {device_label(found.device)}; defined for a GPU")


def prefill(t: Tables) -> Outcome:
    """Judges the headline scheme's prefill on its worst workload, over the baseline."""
    rows, bar = t.headline_perf() if len(t.perf) else t.perf, CLAIMS["prefill-speed"].bar
    if len(failed := rows[_too_large(rows)]):
        found = _failed(failed, t.labels.timed)
        return _for_a_gpu(t, found)
    if not len(rows) or rows["prefill_ratio"].isna().all():
        return _of_kernels(t, [t.study.baseline], bar)
    name, worst = _worst(speeds := _speeds(rows), largest=False)
    found = _outcome(
        t, speeds, worst, t.labels.timed[name], bar, ROUNDS, "scheme_rounds", "rounds", MIN_ROUNDS,
        baseline=t.labels.scheme(t.study.baseline),
    )  # fmt: skip
    return _for_a_gpu(t, found).lacking(_not_timed(t, rows))


def quantize_share(t: Tables) -> Outcome:
    """Judges quantization as a share of the baseline's prefill, on the worst workload."""
    rows = t.headline_perf() if len(t.perf) else t.perf
    if not len(rows) or rows["quantize_share"].isna().all():
        return no_record("throughput")
    # the share is of the medians, so its ends have the relative spread of the rounds
    relative = {
        p: rows[f"scheme_quantize_ms_{p}"].astype(float)
        / rows.scheme_quantize_ms_median.astype(float)
        for p in ("p10", "p90")
    }
    share = rows.quantize_share.astype(float)
    rows = _valued(rows, "quantize_share", share * relative["p10"], share * relative["p90"])
    name, worst = _worst(rows, largest=True)
    found = _outcome(
        t, rows, worst, t.labels.timed[name], CLAIMS["quantization-share"].bar, ROUNDS,
        "scheme_rounds", "rounds", MIN_ROUNDS,
    )  # fmt: skip
    return found.lacking(_not_timed(t, rows[~_too_large(rows)]))


def energy(t: Tables) -> Outcome:
    """Judges the headline scheme's measured energy on its worst workload, over the baseline."""
    rows = t.energy[t.energy["scheme"] == t.study.headline] if len(t.energy) else t.energy
    if not len(rows):
        return no_record("energy")
    measured = counted(rows)
    if not len(measured) or measured["energy_ratio"].isna().all():
        return not_measured("an estimate without counters")
    ends = (measured[f"energy_ratio_{end}"].astype(float) for end in ("low", "high"))
    rows = _valued(measured, "energy_ratio", *ends)
    name, worst = _worst(rows, largest=True)
    found = _outcome(
        t, rows, worst, t.labels.metered[name], CLAIMS["energy-per-token"].bar,
        "range of trials that followed each other", "scheme_trials", "trials",
        MIN_TRIALS, baseline=t.labels.scheme(t.study.baseline),
    )  # fmt: skip
    there = set(zip(rows.workload, rows.rep, strict=True))
    return found.lacking(_not_there(t, t.study.energy_cells(), there, t.labels.metered))


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


def _append_ends(points: pd.DataFrame) -> tuple[float, float]:
    """Returns the least and the largest ratio of costs at the largest and the smallest size.

    Each cost is a 10th or 90th percentile of rounds, of the worst or the best repetition.

    Args:
        points: Rows of one series, one token per call, that were measured.
    """
    lows, highs = [], []
    for _, rep in points.groupby("rep"):
        first, last = (rep.sort_values("tokens").iloc[at] for at in (0, -1))
        lows.append(float(last.token_ms_p10 / first.token_ms_p90))
        highs.append(float(last.token_ms_p90 / first.token_ms_p10))
    return min(lows), max(highs)


def append(t: Tables) -> Outcome:
    """Judges the cost of an appended token at the largest cache over that at the smallest."""
    ours = append_growth(t.append, t.study.headline)
    if ours is None:
        return no_record("append")
    theirs = append_growth(t.append, "concatenation")
    mine = t.append[(t.append.series == t.study.headline) & (t.append.chunk == 1)]
    mine = mine[mine.token_ms_median.notna()]
    low, high = _append_ends(mine)
    beside = f"; {theirs[0]:.2f} where arrays are concatenated" if theirs else ""
    sizes = f"from {ours[1]:,} to {ours[2]:,} tokens"
    text = f"{ours[0]:.2f} [{low:.2f}, {high:.2f}] {sizes}{beside}"
    if ours[2] < 128 * ours[1]:
        return not_measured(f"{text}; defined from 1K to 128K")
    rounds = int(mine.token_ms_n.min())
    return Outcome(
        text,
        CLAIMS["append-growth"].bar.met(low, high),
        rounds,
        "rounds",
        rounds >= MIN_ROUNDS,
        *(ours[0], low, high, ROUNDS),
        cache=t.labels.scheme(t.study.headline),
        workload=sizes,
        device=str(mine["device"].iloc[0]),
    )


def over_reference(t: Tables) -> Outcome:
    """Judges prefill over KVQuant's procedure on one workload, both against the same baseline."""
    names = [n for n, s in t.study.schemes.items() if s.kind == "kvquant-ref"]
    theirs = t.perf[t.perf["scheme"].isin(names)] if len(t.perf) else t.perf
    ours = t.headline_perf() if len(t.perf) else t.perf
    bar = CLAIMS["prefill-over-kvquant"].bar
    if not len(theirs) or not len(ours):
        return _of_kernels(t, names, bar)
    both = ours.merge(theirs, on=["workload", "rep"], suffixes=("", "_ref"))
    if len(failed := both[_too_large(both, "scheme_status_ref")]):
        found = _failed(failed, t.labels.timed)
        return _for_a_gpu(t, found)
    both = _speeds(ours).merge(_speeds(theirs), on=["workload", "rep"], suffixes=("", "_ref"))
    both = both.assign(speed=both.value / both.value_ref)
    if both.speed.isna().all():
        return not_measured("no workload that both ran")
    both = _valued(both, "speed", both.low / both.high_ref, both.high / both.low_ref)
    both = both.assign(rounds=both[["scheme_rounds", "scheme_rounds_ref"]].min(axis=1))
    name, worst = _worst(both, largest=False)
    found = _outcome(
        t, both, worst, t.labels.timed[name], bar, ROUNDS, "rounds", "rounds", MIN_ROUNDS,
        baseline=t.labels.scheme(str(worst.scheme_ref.iloc[0])),
    )  # fmt: skip
    return _for_a_gpu(t, found)
