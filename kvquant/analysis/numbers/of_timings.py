"""Numbers of timed sections: prefill and decode, energy, kernels and appended tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pandas as pd

from kvquant.analysis.claims_of_cost import append_growth
from kvquant.analysis.labels import case_label, device_label
from kvquant.analysis.numbers.number import Number, fact, measured, spread
from kvquant.analysis.pareto import counted
from kvquant.analysis.study_tables import Tables
from kvquant.analysis.timed_on import one_device


def _prefix(t: Tables, model: object) -> str:
    return str(model) if len(t.study.models) > 1 else ""


def throughput(t: Tables) -> Iterator[Number]:
    """Yields SCHEME.WORKLOAD.{prefill, decode, quantize}, over the unquantized cache."""
    if not len(t.perf):
        return
    columns = {"prefill_ratio": "prefill", "decode_ratio": "decode", "quantize_share": "quantize"}
    for (model, scheme, workload), rows in t.perf.groupby(["model", "scheme", "workload"]):
        for column, name in columns.items():
            values = rows[column].astype(float).dropna()
            if len(values):
                ends = (values.median(), values.min(), values.max())
                for number in spread(f"{scheme}.{workload}.{name}", ends, 2, rows):
                    yield number.within(_prefix(t, model))


def energy(t: Tables) -> Iterator[Number]:
    """Yields SCHEME.WORKLOAD.joules-ratio, where counters measured it."""
    rows = counted(t.energy)
    if not len(rows):
        return
    for (model, scheme, workload), mine in rows.groupby(["model", "scheme", "workload"]):
        ratios = mine.energy_ratio.astype(float)
        ends = (ratios.median(), mine.energy_ratio_low.min(), mine.energy_ratio_high.max())
        for number in spread(f"{scheme}.{workload}.joules-ratio", ends, 2, mine):
            yield number.within(_prefix(t, model))


def kernels(t: Tables) -> Iterator[Number]:
    """Yields kernels.CASE.{name, device} and kernels.CASE.MEASURE.SIDE.{over, share, ms}.

    "over" is the time of the side over ours, and "share" the rate of a kernel of ours as a share of
    a device copy's. A case that was not timed on the study's device is shown as timed on another.
    """
    if not len(t.kernels):
        return
    for case, timed in t.kernels.groupby("case", sort=False):
        rows = one_device(t.study, timed)
        first = rows.iloc[0]
        yield fact(f"kernels.{case}.device", device_label(str(first["device"])), rows)
        name = case_label(
            str(first["shape"]), int(first.batch), int(first.tokens), int(first.all_tokens)
        )
        yield fact(f"kernels.{case}.name", name, rows)
        for index in rows.index:
            row = rows.loc[[index]]
            side = re.sub(r"[^a-z0-9.]+", "-", str(row.side.iloc[0]).lower()).strip("-")
            prefix = f"kernels.{case}.{row.measure.iloc[0]}.{side}"
            for number in _of_kernel(row):
                yield number.within(prefix)


def _of_kernel(row: pd.DataFrame) -> Iterator[Number]:
    one = row.iloc[0]
    yield from spread("over", (one.over_ours_median, one.over_ours_p10, one.over_ours_p90), 2, row)
    yield from measured("ms", one.ms_median, 3, row)
    if "copy_share" in row:
        yield from measured("share", one.copy_share, 2, row)


def append(t: Tables) -> Iterator[Number]:
    """Yields the growth of an appended token's cost, of ours and of concatenated arrays."""
    for key, series in (("append", t.study.headline), ("concatenation", "concatenation")):
        grown = append_growth(t.append, series)
        if grown is not None:
            rows = t.append[(t.append.series == series) & (t.append.chunk == 1)]
            yield from measured(f"{key}.growth", grown[0], 2, rows)
            yield from measured(f"{key}.from", grown[1], 0, rows)
            yield from measured(f"{key}.to", grown[2], 0, rows)
