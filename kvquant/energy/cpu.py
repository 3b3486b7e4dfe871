"""Telemetry of the CPU from the operating system."""

from __future__ import annotations

from typing import Any

import psutil


def cpu_telemetry() -> list[dict[str, Any]]:
    """Returns the CPU's current clock and utilization."""
    try:
        clock = psutil.cpu_freq()
    except Exception:  # a virtual machine may not expose it
        clock = None
    return [
        {
            "device": "cpu",
            "clock_mhz": clock.current if clock else None,
            "utilization_percent": psutil.cpu_percent(),
        }
    ]
