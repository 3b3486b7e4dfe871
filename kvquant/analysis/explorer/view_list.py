"""The views of the explorer: name, caption, kind and source of each.

A view is registered here and nowhere else; the page makes a tab of it. The workflow reads this list
for the report, so it imports neither torch nor pandas and names the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvquant.analysis.sections import Section
from kvquant.study.config import Study
from kvquant.study.registrations import by_name
from kvquant.study.tasks import PasskeyTask

SECTION = Section.ACCURACY_AGAINST_COST
LABEL = "explorer of all results"
CAPTION = (
    "All results of the study in one page: schemes, evaluations, timings and claims in tables that "
    "sort and filter, accuracy against cost on axes of your choice, and maps of passkey retrieval. "
    "A view is kept in the page's address, and its rows can be saved as CSV. The page needs no "
    "network: download it and open the file."
)


@dataclass(frozen=True)
class View:
    """A tab of the explorer.

    Attributes:
        name: Its name in links.
        label: Its name for readers.
        caption: What it shows and how to read it, in plain text.
        make: The name ("module:function") of a function of a
            :class:`kvquant.analysis.explorer.source.Source`, which returns a
            :class:`kvquant.analysis.explorer.values.Sheet`, or the JSON of another kind.
        kind: How the page draws it.
        condition: Whether a study has it.
    """

    name: str
    label: str
    caption: str
    make: str
    kind: Literal["table", "scatter", "maps"] = "table"
    condition: Callable[[Study], bool] = lambda study: True


_HERE = "kvquant.analysis.explorer"
VIEWS = by_name(
    (
        View(
            "schemes",
            "Schemes",
            "A row per cache scheme, with the first measure of each kind. The heads name tasks and "
            "workloads; what the columns mean is below the table. A cell without a number says "
            "why: not measured (the study asks for it), not asked, or out of memory.",
            f"{_HERE}.schemes:sheet",
        ),
        View(
            "tasks",
            "Evaluations",
            "A row per scheme and task, measured or not, and one per mean over a suite's tasks.",
            f"{_HERE}.tasks:sheet",
        ),
        View(
            "scatter",
            "Accuracy against cost",
            "Each marker is a scheme, in the color and shape of the study's figures. The line "
            "joins the schemes that no other scheme shown beats on both axes, and a hollow marker "
            "is beaten. Bars are intervals, where the measure has them.",
            f"{_HERE}.data:axes",
            kind="scatter",
        ),
        View(
            "passkeys",
            "Passkeys",
            "Share of passkeys that were found, in percent, by prompt length, over all seeds.",
            f"{_HERE}.passkeys:maps",
            kind="maps",
            condition=lambda study: any(isinstance(t, PasskeyTask) for t in study.tasks.values()),
        ),
        View(
            "workloads",
            "Speed and energy",
            "A row per scheme and workload of a model of the study, of all devices. Each job "
            "measures its scheme and the unquantized cache in turns. Brackets hold the ends of "
            "repetitions, or of trials for energy.",
            f"{_HERE}.timed_sheets:workloads",
            condition=lambda study: bool(study.throughput_cells() or study.energy_cells()),
        ),
        View(
            "jobs",
            "Whole jobs",
            "A row per cache of each case of whole jobs: prompts and their answers on a model of "
            "random weights. The caches of a case take turns. Brackets hold the slowest and the "
            "fastest trial.",
            f"{_HERE}.timed_sheets:jobs",
            condition=lambda study: bool(study.job_cases()),
        ),
        View(
            "kernels",
            "Kernels",
            "A row per side of each measurement of the kernel benchmark, on random data. The sides "
            "take turns. Brackets hold the 10th and 90th percentile of rounds.",
            f"{_HERE}.kernel_sheets:kernels",
            condition=lambda study: bool(study.kernel_cases()),
        ),
        View(
            "appends",
            "Appends",
            "Time of one more token by the tokens that the cache of one layer already holds, with "
            "quantization and storage.",
            f"{_HERE}.kernel_sheets:appends",
            condition=lambda study: study.append is not None,
        ),
        View(
            "claims",
            "Claims",
            "Each claim with its verdict, what was measured in this study, on how much evidence, "
            "and how it is defined.",
            f"{_HERE}.data:claims",
        ),
        # A new view goes above this line.
    )
)


def shown(study: Study) -> list[View]:
    """Returns the views that a study has."""
    return [view for view in VIEWS.values() if view.condition(study)]
