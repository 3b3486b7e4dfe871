"""The tolerances of a reproduction: what is compared, how, and what counts as the same.

This is the only place where they are stated. The page and the table show the text of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvquant.study.registrations import by_name

Kind = Literal["exact", "equivalent", "ratio", "shown"]


@dataclass(frozen=True)
class Tolerance:
    """How one quantity is compared.

    Attributes:
        name: The quantity.
        kind: "exact": the same on every machine. "equivalent": measured on the same samples, whose
            mean difference has an interval, which is compared with a margin. "ratio": of a scheme
            over the baseline in the same process, which may be off by a share. "shown": depends on
            the device, and is not judged.
        unit: Unit of the values.
        relative: Share of the published value that a ratio may be off by, or a margin's width;
            None: the study's margin.
        absolute: Least width of a margin, in the quantity's unit.
        why: Why this tolerance.
    """

    name: str
    kind: Kind
    unit: str = ""
    relative: float | None = None
    absolute: float = 0.0
    why: str = ""

    @property
    def text(self) -> str:
        """Returns the tolerance in words."""
        if self.kind == "exact":
            return "equal"
        if self.kind == "shown":
            return "none: not judged"
        if self.relative is None:
            return "the study's margin of equivalence"
        least = f", at least {self.absolute:g} {self.unit}" if self.absolute else ""
        return f"±{self.relative:.0%} of the published value{least}"


_DETERMINED = "follows from the study and its seeds alone"
_BYTES = "the format decides the bytes of a token, whatever the device"
_ROOM = (
    "of a scheme with outliers, where devices differ in kind or some seeds were left out: a GPU "
    "makes room for half as many outliers again as were calibrated, and a little more for each "
    "batch; a processor makes room for as many as there are"
)
_TIMED = "both sides ran in turns in one process; another device has another balance"

TOLERANCES = by_name(
    [
        Tolerance("prompts", "exact", "sha256", why=_DETERMINED),
        Tolerance("text", "exact", "sha256", why=_DETERMINED),
        Tolerance("windows", "exact", "places", why=_DETERMINED),
        Tolerance("samples", "exact", "samples", why=_DETERMINED),
        Tolerance("tokens", "exact", "tokens", why=_DETERMINED),
        Tolerance("cache elements", "exact", "elements", why=_BYTES),
        Tolerance("cache bytes", "exact", "bytes", why=_BYTES),
        Tolerance("bits per element", "exact", "bits", why=_BYTES),
        Tolerance("cache bytes, with room for outliers", "ratio", "bytes", 0.05, why=_ROOM),
        Tolerance("bits per element, with room for outliers", "ratio", "bits", 0.05, why=_ROOM),
        Tolerance("status", "exact", "", why="whether the side ran, or was out of memory"),
        Tolerance("loss", "equivalent", "nats per token", why="windows in pairs"),
        Tolerance("score", "equivalent", "points", why="prompts in pairs"),
        Tolerance(
            "KL divergence", "equivalent", "nats per token", 0.05, 2e-4, "windows in pairs; the "
            "distance from the unquantized cache of the same process",
        ),
        Tolerance("prefill speed over baseline", "ratio", "times", 0.10, why=_TIMED),
        Tolerance("decode speed over baseline", "ratio", "times", 0.15, why=_TIMED),
        Tolerance("energy over baseline", "ratio", "times", 0.10, why=_TIMED),
        Tolerance("append time over baseline", "ratio", "times", 0.25, why=_TIMED),
        Tolerance("kernel time over ours", "ratio", "times", 0.15, why=_TIMED),
        Tolerance("share of copy bandwidth", "ratio", "", 0.15, why=_TIMED),
        Tolerance("job speed over baseline", "ratio", "times", 0.10, why=_TIMED),
        Tolerance("job energy over baseline", "ratio", "times", 0.10, why=_TIMED),
        Tolerance(
            "tokens held over baseline", "ratio", "times", 0.02, why="both in the same memory"
        ),
        Tolerance("perplexity", "shown", "", why="`loss` is judged, which has pairs"),
        Tolerance("tokens per second", "shown", "tokens/s", why="of the device"),
        Tolerance("time", "shown", "ms", why="of the device"),
        Tolerance("energy", "shown", "J/token", why="of the device"),
    ]
)  # fmt: skip
