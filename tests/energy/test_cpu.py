"""Telemetry of the CPU: its clock where the machine tells one, its utilization."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvquant.energy import cpu


def fails() -> Any:
    raise OSError("no such file")


@pytest.mark.parametrize(
    ("clock", "expected"),
    [(lambda: SimpleNamespace(current=2400.0), 2400.0), (lambda: None, None), (fails, None)],
    ids=["clock", "none", "error"],
)
def test_a_clock_that_is_not_told_is_none(
    clock: Any, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.psutil, "cpu_freq", clock)
    monkeypatch.setattr(cpu.psutil, "cpu_percent", lambda: 12.5)
    assert cpu.cpu_telemetry() == [
        {"device": "cpu", "clock_mhz": expected, "utilization_percent": 12.5}
    ]
