"""Energy counters of CPU packages (RAPL), each socket counted once.

The powercap file system has overlapping zones: `psys` is the whole platform with its packages,
zones below a package are parts of it, `intel-rapl-mmio` is another interface to the same package,
and on AMD's first two Zen generations each die of a socket repeats the counter of the socket. On
Intel's multi-die packages (Cascade Lake-AP) each die has a counter of its own. The counters
themselves show which case a machine is, because repeated counters always agree.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvquant.energy.cpu import cpu_telemetry
from kvquant.errors import UserError

POWERCAP = Path("/sys/class/powercap")
SKEW = 500_000  # microjoules by which two reads of one counter may differ, about 1 ms of work
MAX_WATTS = 1000.0  # per package; more means that a counter was reset
# "intel-rapl:0", but neither its part "intel-rapl:0:0" nor its repetition "intel-rapl-mmio:0"
_ZONE = re.compile(r"\w+-rapl(-tpmi)?:\d+")
_PACKAGE = re.compile(r"package-(\d+)(?:-die-(\d+))?")


@dataclass
class _Counter:
    """Holds the counter of a zone and unwraps it.

    Attributes:
        zone: Folder of the zone.
        package: Name of its socket.
        wraps_at: Largest value of the counter, microjoules.
        opened: Value when the meter was opened, microjoules.
        last: Latest value, microjoules.
        total: Microjoules since the meter was opened.
        repeats: Counters of other dies that this one may repeat.
    """

    zone: Path
    package: str
    wraps_at: int
    opened: int
    last: int
    total: int = 0
    repeats: list[_Counter] = field(default_factory=list)

    def step(self, seconds: float) -> None:
        """Reads the counter and adds its increase to `total`.

        Raises:
            UserError: The counter was reset.
        """
        value = _microjoules(self.zone / "energy_uj")
        gained = value - self.last
        if gained < 0:
            gained += self.wraps_at
            if not 0 <= gained <= MAX_WATTS * 1e6 * max(seconds, 1.0):
                raise UserError(
                    f"{self.zone.name}: the energy counter went from {self.last} to {value} uJ, "
                    "which is no wrap: it was set back (sleep, or the driver was loaded again); "
                    "run the job again"
                )
        self.last = value
        self.total += gained


def _microjoules(file: Path) -> int:
    value = int(file.read_text(encoding="ascii"))
    if value < 0:
        raise ValueError(f"{value} is negative")
    return value


def _domain(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return zone.name  # a zone without a name is a package


def _apart(a: int, b: int, wraps_at: int) -> int:
    """Returns the distance between two values of a counter that wraps."""
    return min((a - b) % wraps_at, (b - a) % wraps_at)


def package_zones(powercap: Path) -> list[Path]:
    """Returns the zones of the CPU packages and their dies, each domain once."""
    found: dict[str, Path] = {}
    for zone in sorted(powercap.glob("*-rapl*:*"), key=lambda z: (len(z.name), z.name)):
        if _ZONE.fullmatch(zone.name):
            domain = _domain(zone)
            if domain == zone.name or _PACKAGE.fullmatch(domain):
                found.setdefault(domain, zone)
    return list(found.values())


class RaplMeter:
    """Reads the energy counters of CPU packages from the powercap file system.

    The counters include everything that runs on the machine, but neither memory nor power supply,
    so the source is marked `estimated`. The meter is thread-safe.

    Args:
        zones: Folders with `energy_uj` and `max_energy_range_uj`, from :func:`package_zones`.
        now: Clock in seconds, which tests replace.

    Raises:
        OSError, ValueError: A zone cannot be read.
    """

    source: Literal["nvml", "estimated"] = "estimated"
    refresh = 0.001

    def __init__(self, zones: list[Path], now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._fault: str | None = None
        self._counters: list[_Counter] = []
        for zone in zones:
            wraps_at = _microjoules(zone / "max_energy_range_uj")
            value = _microjoules(zone / "energy_uj")
            if not value <= wraps_at or not wraps_at:
                raise ValueError(f"{zone.name}: {value} is beyond the counter's range {wraps_at}")
            domain = _domain(zone)
            match = _PACKAGE.fullmatch(domain)
            package = match[1] if match else domain
            self._counters.append(_Counter(zone, package, wraps_at, value, value))
        self._moment = now()
        for i, one in enumerate(self._counters):
            one.repeats = [
                other
                for other in self._counters[:i]
                if other.package == one.package
                and other.wraps_at == one.wraps_at
                and _apart(other.opened, one.opened, one.wraps_at) <= SKEW
            ]
        self._packages = len({counter.package for counter in self._counters})

    @property
    def method(self) -> str:
        """The counters in words, with the dies that repeat the counter of their socket."""
        repeated = [c.zone.name for c in self._counters if c.repeats]
        mirrors = f" ({', '.join(repeated)} repeat another die's)" if repeated else ""
        return (
            f"rapl: energy counters of {self._packages} processor package(s){mirrors}, whole "
            "machine; not the job alone, so marked estimated"
        )

    def _part_ways(self, counter: _Counter, before: int) -> None:
        """Drops from `repeats` the counters that have moved apart from this one."""
        agree = [
            other
            for other in counter.repeats
            if _apart(other.last, counter.last, counter.wraps_at) <= SKEW
        ]
        if counter.repeats and not agree and before > SKEW:
            raise UserError(
                f"{counter.zone.name}: its energy counter repeated another die's and now differs "
                "from it, so the energy of the package is not known; run the job again"
            )
        counter.repeats = agree

    def _note_unseen(self, seconds: float) -> None:
        """Notes a fault if a counter may have wrapped more than once since the last reading."""
        for counter in self._counters:
            if seconds > 10 and seconds * MAX_WATTS * 1e6 > counter.wraps_at:
                self._fault = (
                    f"{counter.zone.name}: {seconds:.0f} s without a reading, in which the energy "
                    "counter may have wrapped more than once; run the job again"
                )

    def take_fault(self) -> str | None:
        """Returns why the energy since the last call may be invalid, or None."""
        with self._lock:
            fault, self._fault = self._fault, None
            return fault

    def read(self) -> float:
        """Returns the joules since the meter was opened, with counters unwrapped.

        Raises:
            UserError: A counter cannot be read or was reset.
        """
        with self._lock:
            moment = self._now()
            self._note_unseen(moment - self._moment)
            before = [counter.total for counter in self._counters]
            for counter in self._counters:
                try:
                    counter.step(moment - self._moment)
                except (OSError, ValueError) as error:
                    raise UserError(
                        f"{counter.zone.name}/energy_uj cannot be read "
                        f"({getattr(error, 'strerror', None) or error}): run the job again"
                    ) from None
            self._moment = moment
            for counter, earlier in zip(self._counters, before, strict=True):
                self._part_ways(counter, earlier)
            return sum(c.total for c in self._counters if not c.repeats) / 1e6

    def telemetry(self) -> list[dict[str, Any]]:
        """Returns the CPU's clock and utilization."""
        return cpu_telemetry()

    def close(self) -> None:
        """Does nothing, as the meter holds nothing."""


def open_rapl(powercap: Path = POWERCAP) -> RaplMeter | str:
    """Opens the meter of all packages, or returns the reason why there is none.

    If one package cannot be read, none is counted, and the reason names it.
    """
    try:
        zones = package_zones(powercap)
    except OSError as error:
        return f"RAPL: {error.strerror}"
    if not zones:
        return "RAPL: no processor package has a counter"
    for zone in zones:
        for name in ("max_energy_range_uj", "energy_uj"):
            try:
                _microjoules(zone / name)
            except (OSError, ValueError) as error:  # usually readable by root only
                why = getattr(error, "strerror", None) or f"damaged ({error})"
                return f"RAPL: {zone.name}/{name} cannot be read ({why})"
    try:
        return RaplMeter(zones)
    except (OSError, ValueError) as error:
        return f"RAPL: {error}"
