"""The quantities of evaluations, of a task and scheme over the seeds that both sides measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import pandas as pd

from kvquant.analysis.comparison import compare_scores, compare_windows, pair
from kvquant.analysis.eval_rows import sample_score
from kvquant.analysis.paired import PairedTest, grouped_test
from kvquant.analysis.reproduction.pairs import Pair, Side
from kvquant.analysis.reproduction.rows import Row, Subject, by_interval, exact, ratio, shown
from kvquant.analysis.reproduction.tolerances import TOLERANCES
from kvquant.analysis.sample_tests import SampleTest, separate_windows, series_inflation
from kvquant.study.config import Study
from kvquant.study.records import EvalRecord
from kvquant.study.suite import scored_suites

COUNTS = {
    "samples": "samples",
    "tokens": "tokens",
    "cache elements": "cache_elements",
}
PLACES = ["row", "start", "tokens"]


def _record(side: Side) -> EvalRecord:
    return cast(EvalRecord, side.record)


def _samples(sides: Iterable[Side]) -> pd.DataFrame:
    """Returns a row per sample with its score and, of a window, its place and divergence."""
    rows = [
        {
            "task": _record(side).task,
            "seed": _record(side).seed,
            "sample": int(sample["index"]),
            **{place: sample.get(place) for place in PLACES},
            "score": sample_score(sample, _record(side).suite),
            "kl": sample.get("kl"),
        }
        for side in sides
        for sample in side.samples
    ]
    return pd.DataFrame(rows)


def _values(sides: Iterable[Side]) -> pd.DataFrame:
    return pd.DataFrame([{"seed": _record(s).seed, "value": _record(s).value} for s in sides])


def subject_of(pairs: list[Pair]) -> Subject:
    """Returns what the rows of these pairs, of one task and scheme, are about."""
    first = pairs[0]
    told: dict[str, str] = {}
    for field in ("device", "versions"):
        for name in ("published", "own"):
            found = dict.fromkeys(str(getattr(getattr(p, name), field)) for p in pairs)
            told[f"{name}_{field}"] = "; ".join(found)
    names = first.names
    return Subject(
        first.stage, str(names["model"]), str(names["scheme"]), str(names["task"]), len(pairs),
        ", ".join(sorted({p.quantizer for p in pairs} - {""})), **told,
    )  # fmt: skip


def _hashes(records: list[EvalRecord], what: str) -> list[str | None]:
    """Returns the hash of each record's prompts or text, or None where it does not say."""
    if what == "prompts":
        return [record.prompts_sha256 for record in records]
    return [record.inputs.get(what) for record in records]


def _exact_rows(study: Study, subject: Subject, pairs: list[Pair]) -> list[Row]:
    published, own = ([_record(s) for s in side] for side in _sides(pairs))
    rows = []
    for what in ("prompts", "text"):
        theirs, mine = _hashes(published, what), _hashes(own, what)
        if None not in (*theirs, *mine):
            told = [" ".join(dict.fromkeys(str(v)[:12] for v in side)) for side in (theirs, mine)]
            rows.append(exact(subject, what, told[0], told[1]))
    if is_of_windows(published[0]):
        places = [
            [(w["start"], w["tokens"]) for side in sides for w in side.samples]
            for sides in _sides(pairs)
        ]
        told = [f"{len(p)} windows" for p in places]
        same = places[0] == places[1]
        rows.append(exact(subject, "windows", told[0], told[1] if same else f"other {told[1]}"))
    for quantity, field in COUNTS.items():
        theirs_sum, own_sum = (sum(getattr(r, field) for r in side) for side in (published, own))
        rows.append(exact(subject, quantity, theirs_sum, own_sum))
    return rows + _sizes(study, subject, pairs)


def _roomy(study: Study, pairs: list[Pair]) -> bool:
    """Returns whether sizes may differ by the room that was made for outliers."""
    keeps = getattr(study.scheme(str(pairs[0].names["scheme"])), "outliers", 0) > 0
    return keeps and any(p.published.on_gpu != p.own.on_gpu or not p.whole for p in pairs)


def _sizes(study: Study, subject: Subject, pairs: list[Pair]) -> list[Row]:
    """Returns the rows of bytes and bits."""
    nbytes, bits = list[int](), list[float]()
    for sides in _sides(pairs):
        records = [_record(side) for side in sides]
        nbytes.append(sum(r.cache_bytes for r in records))
        bits.append(8.0 * nbytes[-1] / sum(r.cache_elements for r in records))
    rows = []
    sizes: dict[str, list[int] | list[float]] = {"cache bytes": nbytes, "bits per element": bits}
    for quantity, (published, own) in sizes.items():
        if published != own and _roomy(study, pairs):
            rows.append(ratio(subject, f"{quantity}, with room for outliers", published, own))
        else:
            rows.append(exact(subject, quantity, published, own))
    return rows


def is_of_windows(record: EvalRecord) -> bool:
    """Returns whether a record's samples are windows of text, which are compared by their loss."""
    return record.suite not in scored_suites()


def _sides(pairs: list[Pair]) -> tuple[list[Side], list[Side]]:
    return [p.published for p in pairs], [p.own for p in pairs]


def _interval_row(
    subject: Subject, quantity: str, values: tuple[float, float], test: SampleTest | PairedTest,
    margin: float, identical: bool, to_unit: Callable[[float], float], note: str,
) -> Row:  # fmt: skip
    verdict = by_interval(
        (test.low, test.high), (test.inner_low, test.inner_high), margin, identical
    )
    rule = TOLERANCES[quantity]
    told = f"within ±{to_unit(margin):.4g} {rule.unit}: {rule.text}"
    notes = ["every pair is equal"] * identical + [note] * bool(note)
    # An interval of equal pairs would be about further samples, which nobody asks here.
    low, high = (None, None) if identical else (to_unit(test.low), to_unit(test.high))
    return Row(
        subject, quantity, verdict, *values, to_unit(test.mean), low, high, rule.unit, rule.unit,
        told, "; ".join(notes),
    )  # fmt: skip


def _statistical_rows(study: Study, subject: Subject, pairs: list[Pair]) -> list[Row]:
    published, own = _sides(pairs)
    record = _record(published[0])
    theirs, mine = _samples(published), _samples(own)
    keys = ["seed", "sample"]
    what = f"{subject.model}/{subject.scheme}/{subject.what} again"
    joined = pair(mine, theirs, keys, what)
    places = list(dict.fromkeys([*keys, "task", *PLACES]))
    joined = joined.merge(mine[places], on=keys)
    by_seed = pair(_values(own), _values(published), ["seed"], what)
    margin = study.statistics.margins[record.suite]
    windows = is_of_windows(record)
    found = (compare_windows if windows else compare_scores)(study, by_seed, joined, margin, what)
    base, ours = (float(by_seed[side].mean()) for side in ("base", "ours"))
    identical = found.samples.tied == found.samples.n
    if windows:
        row = _interval_row(
            subject, "loss", (float(joined["base"].mean()), float(joined["ours"].mean())),
            found.samples, margin.in_nats(base), identical, float, found.note,
        )  # fmt: skip
        rows = [row, shown(subject, "perplexity", base, ours)]
        return rows + _divergence_rows(study, subject, joined, mine, theirs)
    points = found.of_samples
    return [
        _interval_row(
            subject, "score", (base, ours), found.samples, margin.half_width(base) / points(1.0),
            identical, points, found.note,
        )
    ]  # fmt: skip


def _divergence_rows(
    study: Study, subject: Subject, joined: pd.DataFrame, mine: pd.DataFrame, theirs: pd.DataFrame
) -> list[Row]:
    """Returns the row of the distance from the unquantized cache, where both sides measured it."""
    if mine["kl"].isna().any() or theirs["kl"].isna().any():
        return []
    keys = ["seed", "sample"]
    both = joined[[*keys, "start", "tokens"]]
    for name, table in (("ours_kl", mine), ("base_kl", theirs)):
        both = both.merge(table[[*keys, "kl"]].rename(columns={"kl": name}), on=keys)
    kept = separate_windows(both).sort_values("start")
    each = {name: (kept[f"{name}_kl"] / kept["tokens"]).to_numpy() for name in ("base", "ours")}
    differences = each["ours"] - each["base"]
    rule = TOLERANCES["KL divergence"]
    assert rule.relative is not None
    values = float(each["base"].mean()), float(each["ours"].mean())
    margin = max(rule.relative * values[0], rule.absolute)
    test = grouped_test(
        [differences], margin, study.statistics.alpha, inflation=series_inflation(differences)
    )
    identical = bool(np.all(differences == 0))
    return [_interval_row(subject, rule.name, values, test, margin, identical, float, "")]


def evaluation_rows(study: Study, pairs: list[Pair]) -> list[Row]:
    """Returns the rows of all evaluations, task by task."""
    groups: dict[tuple[Any, ...], list[Pair]] = {}
    for one in pairs:
        if one.stage == "eval":
            key = tuple(one.names[name] for name in ("model", "scheme", "task"))
            groups.setdefault(key, []).append(one)
    rows: list[Row] = []
    for group in groups.values():
        subject = subject_of(group)
        facts = _exact_rows(study, subject, group)
        rows += facts
        alike = {row.quantity for row in facts if row.verdict == "reproduced"}
        asked = {row.quantity for row in facts} & {"prompts", "text", "windows", "samples"}
        if asked <= alike:  # other samples are no pairs
            rows += _statistical_rows(study, subject, group)
    return rows
