"""What the operating system says of the processor."""

from __future__ import annotations

from typing import Any

import psutil


def cpu_telemetry() -> list[dict[str, Any]]:
    """The processor's clock and utilisation now."""
    try:
        clock = psutil.cpu_freq()
    except Exception:  # not told to a virtual machine
        clock = None
    return [
        {
            "device": "cpu",
            "clock_mhz": clock.current if clock else None,
            "utilization_percent": psutil.cpu_percent(),
        }
    ]
