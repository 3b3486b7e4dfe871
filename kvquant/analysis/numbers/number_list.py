r"""The sources of the numbers of the paper's text.

A source is registered here and nowhere else: `kvquant tables` writes all their numbers, and the
text shows one by its key, as in `\kv{allocated-3.bits}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvquant.errors import UserError
from kvquant.study.dotted import load
from kvquant.study.registrations import by_name

if TYPE_CHECKING:
    from kvquant.analysis.numbers.number import Number
    from kvquant.analysis.study_tables import Tables


@dataclass(frozen=True)
class Source:
    """A source of numbers.

    Attributes:
        name: Its name.
        yields: Names a function ("module:attribute") of :class:`Tables`, which yields
            :class:`Number`; none for what was not measured.
        all_devices: Whether it gets the timings of all devices; else those of one.
    """

    name: str
    yields: str
    all_devices: bool = False


_LIST = (
    Source("study", "kvquant.analysis.numbers.of_study:numbers"),
    Source("schemes", "kvquant.analysis.numbers.of_schemes:numbers"),
    Source("losses", "kvquant.analysis.numbers.of_losses:numbers"),
    Source("throughput", "kvquant.analysis.numbers.of_timings:throughput"),
    Source("energy", "kvquant.analysis.numbers.of_timings:energy"),
    Source("kernels", "kvquant.analysis.numbers.of_timings:kernels", all_devices=True),
    Source("append", "kvquant.analysis.numbers.of_timings:append"),
    Source("jobs", "kvquant.analysis.numbers.of_jobs:numbers"),
)  # end of the list
SOURCES = by_name(_LIST)


def all_numbers(t: Tables) -> list[Number]:
    """Returns all numbers of a study.

    Raises:
        UserError: Two of them have one key, so that a text could show the wrong one.
    """
    found: dict[str, Number] = {}
    for source in SOURCES.values():
        produce: Callable[[Tables], Iterator[Number]] = load(source.yields)
        for number in produce(t if source.all_devices else t.on_one_device()):
            if number.key in found and found[number.key] != number:
                raise UserError(
                    f"numbers: '{number.key}' stands for two numbers: rename a scheme, task, "
                    "workload or case of the study"
                )
            found[number.key] = number
    return list(found.values())
