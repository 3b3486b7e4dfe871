"""Sides in turns: what is slow, missing or broken stops nobody else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.benchmarks.turns import Side, copy_rate, paired, take_turns, to_records
from kvquant.errors import MissingPackage, UserError
from kvquant.study.kernels import KernelsSpec


def limits(**changed: float) -> KernelsSpec:
    case = {"shape": "tiny", "tokens": 32, "measure": ["pack"]}
    fields = {"rounds": 8, "warmup": 2, "max_seconds": 1e6, "slow_seconds": 1.0, "slow_rounds": 2}
    return KernelsSpec.model_validate({"cases": {"one": case}} | fields | changed)


def constant(ms: float, calls: list[str], name: str) -> Callable[[], float]:
    def run() -> float:
        calls.append(name)
        return ms

    return run


def test_slow_sides_sit_out_and_the_rest_goes_on() -> None:
    calls: list[str] = []
    sides = [
        Side("fp16", "fp16", constant(10.0, calls, "a")),
        Side("ours", "ours", constant(20.0, calls, "b")),
        Side("slow", "peer", constant(5000.0, calls, "c")),
    ]
    take_turns(sides, limits())
    assert "".join(calls) == "abc" + "ab" + "abc" * 2 + "ab" * 6
    assert [len(s.times or []) for s in sides] == [8, 8, 8]
    assert sides[2].times == [5000.0] * 2 + [None] * 6
    records = {r.side: r for r in to_records(sides)}
    slow, base = records["slow"].over_ours, records["fp16"].over_ours
    assert slow is not None and base is not None
    assert (slow.median, slow.n) == (250.0, 2)
    assert (base.median, base.n) == (0.5, 8)
    assert records["ours"].over_ours is None


def test_time_ends_the_rounds_but_not_before_five() -> None:
    now = iter(float(i) for i in range(100))
    side = Side("ours", "ours", lambda: 1.0)
    take_turns([side], limits(max_seconds=0.5), now=lambda: next(now))
    assert side.times == [1.0] * 5


def test_what_goes_wrong_is_said_of_the_side() -> None:
    def raises(error: Exception) -> Callable[[], float]:
        def run() -> float:
            raise error

        return run

    lost = torch.cuda.OutOfMemoryError("CUDA out of memory")
    sides = [
        Side("ours", "ours", lambda: 1.0),
        Side("oom", "peer", raises(lost)),
        Side("absent", "peer", raises(MissingPackage("needs the package hqq"))),
        Side("wrong", "peer", raises(UserError("group: 64 does not divide"))),
        Side("broken", "peer", raises(RuntimeError("kernel\ntrace"))),
    ]
    take_turns(sides, limits())
    records = {r.side: r for r in to_records(sides)}
    assert records["ours"].ms is not None
    assert {name: r.status for name, r in records.items()} == {
        "ours": "ok",
        "oom": "oom",
        "absent": "not installed",
        "wrong": "refused",
        "broken": "failed",
    }
    assert records["absent"].reason == "needs the package hqq"
    assert records["broken"].reason == "RuntimeError: kernel"
    assert all(r.ms is None and r.over_ours is None for n, r in records.items() if n != "ours")
    with pytest.raises(RuntimeError, match="kernel"):
        take_turns([Side("ours", "ours", raises(RuntimeError("kernel")))], limits())


def test_without_ours_others_have_times_and_no_ratio() -> None:
    def full() -> float:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    sides = [Side("ours", "ours", full), Side("fp16", "fp16", lambda: 2.0)]
    take_turns(sides, limits())
    ours, base = to_records(sides)
    assert (ours.status, base.status, base.over_ours) == ("oom", "ok", None)
    assert base.ms is not None and base.ms.n == 8


@given(
    st.lists(
        st.tuples(
            st.none() | st.floats(1e-3, 1e3, allow_nan=False),
            st.none() | st.floats(1e-3, 1e3, allow_nan=False),
        ),
        max_size=20,
    )
)
def test_ratios_are_of_common_rounds(rounds: list[tuple[float | None, float | None]]) -> None:
    expected = sorted(a / b for a, b in rounds if a is not None and b is not None)
    found = paired([a for a, _ in rounds], [b for _, b in rounds])
    if not expected:
        assert found is None
        return
    assert found is not None
    assert found.n == len(expected)
    middle = (expected[(len(expected) - 1) // 2] + expected[len(expected) // 2]) / 2
    assert found.median == pytest.approx(middle)


def test_roofline() -> None:
    copied = Side("copy", "copy", lambda: 0.0, 2_000_000_000, times=[1.0, 1.0])
    ours = Side("ours", "ours", lambda: 0.0, 500_000_000, times=[1.0, 1.0])
    assert copy_rate([ours]) is None
    assert copy_rate([copied, ours]) == pytest.approx(2000.0)
    _, record = to_records([copied, ours], elements=10**6, lanes_per_s=3e10)
    assert record.gb_per_s == pytest.approx(500.0)
    assert record.copy_share == pytest.approx(0.25)
    assert record.floor_ms == pytest.approx(0.25)
    assert record.slots_per_element == pytest.approx(30.0)
