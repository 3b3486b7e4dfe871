"""The maps of passkey retrieval: accuracy by prompt length and scheme, at every depth or at one."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from kvquant.analysis.explorer.source import Source
from kvquant.analysis.explorer.values import Cell, missing, number
from kvquant.analysis.figures.passkey import DEPTHS
from kvquant.study.config import Study
from kvquant.study.tasks import PasskeyTask

SHADES = 21  # colors of the map, from 0 to 100 %


def shades() -> list[str]:
    """Returns the colors of the map as in the figure `passkey`, of 0 % first."""
    scale = colormaps["cividis"]
    return [to_hex(scale(float(at))) for at in np.linspace(0, 1, SHADES)]


def tasks_of(study: Study) -> dict[str, PasskeyTask]:
    """Returns the passkey tasks of a study, the shortest prompts first."""
    found = {name: task for name, task in study.tasks.items() if isinstance(task, PasskeyTask)}
    return dict(sorted(found.items(), key=lambda item: item[1].length))


def maps(source: Source) -> dict[str, Any]:
    """Returns tasks, depths and, for each model and scheme, a row of cells of each depth.

    The first row is of all depths together. A scheme that the study does not ask about passkeys has
    no map.
    """
    study = source.study
    tasks = tasks_of(study)
    depths = min(DEPTHS, *(task.samples for task in tasks.values())) if tasks else 0
    samples = source.samples
    rows = samples[samples.task.isin(tasks)] if len(samples) else samples
    by_cell = {}
    if len(rows):
        count = rows.task.map(lambda name: tasks[name].samples).astype(int)
        rows = rows.assign(depth=rows["sample"].astype(int) * depths // count)
        means = rows.groupby(["model", "scheme", "task", "depth"], sort=False)["score"].mean()
        by_cell = dict(means.items())
    found = []
    for model in study.models:
        for scheme in study.schemes:
            why = {task: source.why_no_evaluation(scheme, task) for task in tasks}
            there = [task for task in tasks if (model, scheme, task) in source.evaluations]
            if not there and not any(study.evaluates(scheme, task) for task in tasks):
                continue
            whole: list[Cell] = [
                number(source.evaluations[model, scheme, task]["value"].mean())
                if task in there
                else missing(why[task])
                for task in tasks
            ]
            each = [
                [number(100 * by_cell.get((model, scheme, task, depth), np.nan), why[task])
                 for task in tasks]
                for depth in range(depths)
            ]  # fmt: skip
            found.append(
                {
                    "m": list(study.models).index(model),
                    "s": list(study.schemes).index(scheme),
                    "rows": [whole, *each],
                }
            )
    return {
        "tasks": [f"{task.length:,} tokens" for task in tasks.values()],
        "depths": [f"{100 * i // depths} to {100 * (i + 1) // depths} %" for i in range(depths)],
        "maps": found,
        "shades": shades(),
    }
