"""The screen of `kvquant doctor`: one row per check, and one table of kernels."""

from __future__ import annotations

from typing import Any

from kvquant.diagnosis.screen import Screen

OPERATIONS = {"pack": "pack", "decode": "decode step", "past": "packed past"}


def show(found: dict[str, Any], screen: Screen) -> None:
    """Prints what :func:`kvquant.diagnosis.doctor.examine` found."""
    section, rows = "", []
    for check in found["checks"]:
        if check["section"] != section:
            section = check["section"]
            rows.append(("", section, ""))
        told = check["found"]
        if check["fix"]:
            told += f"\n-> {check['fix']}" if screen.rich else f" -> {check['fix']}"
        rows.append((check["state"], check["name"], told))
    screen.table(("state", "check", "found"), rows, wide=("found",))
    if found["kernels"]:
        _kernels(found, screen)
    screen.line(_verdict(found), "bold")


def _kernels(found: dict[str, Any], screen: Screen) -> None:
    numbers: dict[str, int] = {}  # of each reason

    def number(reason: str) -> int:
        return numbers.setdefault(reason, len(numbers) + 1)

    rows = []
    for row in found["kernels"]:
        operations = row["operations"]
        backends = [
            (operations[name]["backend"] or "none") if name in operations else "-"
            for name in OPERATIONS
        ]
        # What kernels say of codes that they do not know is the same for all kinds but its name.
        own = f"this cache holds '{row['kind']}'"
        reasons = [
            reason.replace(own, "this cache holds those of its own kind")
            for selection in operations.values()
            for refused in selection["refused"]
            for reason in refused["reasons"]
        ]
        reasons += [row["problem"]] if row["problem"] else []
        notes = " ".join(map(str, sorted(set(map(number, reasons)))))
        rows.append((row["state"], row["scheme"], *backends, notes))
    device = "the GPU" if found["device"] == "cuda" else "the CPU"
    screen.table(
        ("state", "scheme", *OPERATIONS.values(), "because"),
        rows,
        title=f"Kernels on {device}, of caches of {found['model']['name']}",
        wide=("because",),
    )
    if any(not row["operations"] and not row["problem"] for row in found["kernels"]):
        screen.line("-: 16 bits, or a cache that does not pack blocks of ours")
    for reason, note in numbers.items():
        screen.line(f"{note}: {reason}")
    screen.line()


def _verdict(found: dict[str, Any]) -> str:
    """Returns the answer in one line."""
    failing = [c for c in found["checks"] if c["needed"] and c["state"] == "missing"]
    if failing:
        names = ", ".join(dict.fromkeys(f"{c['section']} {c['name']}" for c in failing))
        return f"What was asked for cannot run here: {names}."
    device = "on this GPU" if found["device"] == "cuda" else "on the CPU"
    warned = sum(c["state"] in ("warning", "missing") for c in found["checks"])
    more = f"; {warned} rows say what is missing for more" if warned else ""
    return f"kvquant can run here, {device}{more}."
