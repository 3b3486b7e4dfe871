"""The figure `passkey`: passkey accuracy by prompt length and depth of the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvquant.analysis.figures.style import WIDTH, plt
from kvquant.analysis.tables import read_table
from kvquant.study.config import Study
from kvquant.study.tasks import PasskeyTask

DEPTHS = 10  # rows of the heat map


def draw(study: Study, tables: Path) -> Any:
    """Draws accuracy by prompt length and depth of the key, one panel per model and scheme.

    A task of n samples per seed puts key `i` into the i-th of n equal parts of its filler.
    """
    samples = read_table(tables, "samples")
    tasks = {name: t for name, t in study.tasks.items() if isinstance(t, PasskeyTask)}
    lengths = sorted({task.length for task in tasks.values()})
    depths = min(DEPTHS, *(task.samples for task in tasks.values()))
    found = samples[samples.task.isin(tasks)]
    count = found.task.map(lambda name: tasks[name].samples).astype(int)
    found = found.assign(
        length=found.task.map(lambda name: tasks[name].length),
        depth=found["sample"].astype(int) * depths // count,
    )
    models = list(dict.fromkeys(found.model))
    schemes = [s for s in study.schemes if s in set(found.scheme)]
    panels = [(model, scheme) for model in models for scheme in schemes]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 0.5 + 1.15 * rows), sharex=True, sharey=True, squeeze=False
    )
    image = None
    for axis, (model, scheme) in zip(axes.flat, panels, strict=False):
        mine = found[(found.model == model) & (found.scheme == scheme)]
        grid = mine.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
        grid = grid.reindex(index=range(depths), columns=lengths).to_numpy(dtype=float) * 100
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        title = scheme if len(models) == 1 else f"{model}\n{scheme}"
        widest = max(map(len, title.split("\n")))
        axis.set_title(title, fontsize=max(4.0, min(7.0, 80 / widest)))  # titles stay apart
        axis.grid(False)
        axis.set_xticks(range(len(lengths)), [f"{round(n / 1024, 1):g}K" for n in lengths])
        axis.set_yticks([-0.5, (depths - 1) / 2, depths - 0.5], ["0", "50", "100"])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=axes, label="accuracy, %", shrink=0.8)
    figure.supxlabel("prompt tokens", fontsize=7.5)
    figure.supylabel("depth of the key, %", fontsize=7.5)
    return figure
