"""The tables of the kernel benchmark and of appends: a row per side, and per size of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from kvquant.analysis.explorer.source import Source
from kvquant.analysis.explorer.timed_sheets import (
    DEVICE,
    GB,
    NOWHERE,
    STATUS,
    spread_of,
    value_of,
    why_none,
)
from kvquant.analysis.explorer.values import (
    NOT_MEASURED,
    STATUSES,
    Cell,
    Column,
    Row,
    Sheet,
    missing,
    spread,
)
from kvquant.analysis.figures.kernels import BACKENDS, WORDS
from kvquant.analysis.labels import CONCATENATION, case_label, device_label

_OF_KERNELS = (
    Column("ms", "time, ms", "Median, 10th and 90th percentile of rounds.", 3),
    Column(
        "over_ours", "over ours", "Its time over ours in the same rounds; above 1 is slower.", 2
    ),
    Column("gb_per_s", "GB/s", "Bytes that it must read and write over its median time.", 0),
    Column("copy_share", "share of a copy's rate", "", 3),
    Column("bits_per_element", "bits per element", "Of all bytes allocated.", 2),
)


# The measurement that no cache takes part in, and its side that is not torch's.
_ALONE, _EIGHT_BITS = "prompt-attention", "8-bit"


def _side(source: Source, side: str) -> dict[str, str]:
    """Returns the first cells of a row (see :meth:`Source.who`), whose side may be no scheme."""
    cells = source.who(None, side)
    if side in BACKENDS:
        return {**cells, "scheme": f"fp16 attention, {BACKENDS[side][0]}", "family": "16-bit"}
    if side == _EIGHT_BITS:
        return {**cells, "scheme": "8-bit attention", "family": "ours"}
    return {**cells, "scheme": "copy on the device"} if side == "copy" else cells


def _kernels_of(source: Source, scheme: str, measures: Sequence[str]) -> str:
    return "no cache" if set(measures) == {_ALONE} else source.labels.scheme(scheme)


def kernels(source: Source) -> Sheet:
    """Returns the table of the kernel benchmark: a row per side of each measurement."""
    study, table = source.study, source.tables.kernels
    rows = []
    for name, case in study.kernel_cases().items():
        scheme = study.kernel_scheme(case)
        there = table[table["case"] == name]
        for _, row in there.iterrows():
            side, status = str(row["side"]), str(row["status"])
            sizes = (int(row[n]) for n in ("batch", "tokens", "all_tokens"))
            cells: dict[str, Cell] = {
                **_side(source, side),
                "kernels": _kernels_of(source, scheme, [str(row["measure"])]),
                "measure": WORDS.get(str(row["measure"]), str(row["measure"])),
                "case": case_label(str(row["shape"]), *sizes),
                "device": device_label(str(row["device"])),
                "status": STATUSES.get(status, status),
            }
            for column in _OF_KERNELS:
                ends = ("p10", "p90") if column.name in ("ms", "over_ours") else None
                why = why_none(status)
                cells[column.name] = (
                    spread_of(row, column.name, ends, why)
                    if ends
                    else value_of(row, column.name, why)
                )
            key = side.partition(" (")[0]
            cell = ("kernels", str(row["device"]), name, str(row["measure"]), side)
            rows.append(Row(cells, key, bits=cells["bits_per_element"], cell=cell))
        if there.empty:
            none = {column.name: missing(NOT_MEASURED) for column in _OF_KERNELS}
            who = _EIGHT_BITS if set(case.measure) == {_ALONE} else scheme
            by = _kernels_of(source, scheme, case.measure)
            cells = {**_side(source, who), "kernels": by, **none}
            cells["measure"] = ", ".join(WORDS.get(m, m) for m in case.measure)
            cells["case"] = case_label(
                case.shape, case.batch, case.tokens, case.batch * case.tokens
            )
            cells |= {"device": NOWHERE, "status": NOT_MEASURED}
            rows.append(Row(cells, who, cell=("kernels", NOWHERE, name)))
    columns = [column for column in source.who_columns if column.name != "model"]
    first = (
        Column("measure", "measured", text=True),
        Column("case", "case", "Shape, batch and prompt tokens; random data.", text=True),
        Column("kernels", "kernels of", "The scheme whose kernels a row is about.", text=True),
    )
    return Sheet([*columns, *first, DEVICE, STATUS, *_OF_KERNELS], rows)


_OF_APPENDS = (
    Column("token_us", "µs per token", "Median, 10th and 90th percentile of rounds.", 2),
    Column("gb", "cache, GB", "", 3),
)


def appends(source: Source) -> Sheet:
    """Returns the table of appends: the time of one more token by the tokens in the cache."""
    spec, table = source.study.append, source.tables.append
    assert spec is not None
    keys = ["device", "series", "chunk", "tokens"]
    rows = []
    for key, points in table.groupby(keys, sort=False) if len(table) else []:
        device, series, chunk, tokens = key
        times = points[["token_ms_median", "token_ms_p10", "token_ms_p90"]].astype(float) * 1e3
        middle, low, high = times.median()
        status = "ok" if (points.status == "ok").any() else str(points.status.iloc[0])
        cells: dict[str, Cell] = {
            **source.who(None, str(series)),
            "chunk": int(chunk),
            "tokens": int(tokens),
            "device": device_label(str(device)),
            "status": STATUSES.get(status, status),
            "token_us": spread(middle, low, high, why_none(status)),
            "gb": value_of(points.iloc[0], "cache_bytes", why_none(status), GB),
            "reps": f"{len(points)} of {spec.reps}",
        }
        if series == "concatenation":
            cells["scheme"] = CONCATENATION
        cell = ("append", str(device), str(series), str(chunk), str(tokens))
        rows.append(Row(cells, str(series), cell=cell))
    if not rows:
        for series in source.study.append_schemes():
            cells = {**source.who(None, series), "device": NOWHERE, "status": NOT_MEASURED}
            cells |= {"chunk": missing(NOT_MEASURED), "tokens": missing(NOT_MEASURED)}
            cells |= {column.name: missing(NOT_MEASURED) for column in _OF_APPENDS}
            cells["reps"] = f"0 of {spec.reps}"
            rows.append(Row(cells, series, cell=("append", NOWHERE, series)))
    who = [column for column in source.who_columns if column.name != "model"]
    first = (
        Column("tokens", "tokens in the cache", "", 0),
        Column("chunk", "tokens per call", "", 0),
    )
    reps = Column("reps", "repetitions", "Measured, of those asked for.", text=True)
    return Sheet([*who, *first, DEVICE, STATUS, *_OF_APPENDS, reps], rows)
