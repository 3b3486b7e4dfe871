"""The figure `passkey`: passkey accuracy by prompt length and depth of the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvquant.analysis.figures.style import PAGE_WIDTH, SMALL, WIDTH, plt, wrapped
from kvquant.analysis.labels import labels_of
from kvquant.analysis.tables import read_table
from kvquant.study.config import Study
from kvquant.study.tasks import PasskeyTask

DEPTHS = 10  # rows of the heat map
IN_A_COLUMN = 15  # panels; more stand across the page


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
    wide = len(panels) > IN_A_COLUMN
    columns = min(6 if wide else 3, len(panels))
    rows = -(-len(panels) // columns)
    labels = labels_of(study)
    titles = [
        "\n".join(wrapped(name, 16) for name in (labels.model(model), labels.scheme(scheme)))
        if len(models) > 1
        else wrapped(labels.scheme(scheme), 16)
        for model, scheme in panels
    ]
    lines = max(title.count("\n") + 1 for title in titles)
    size = (PAGE_WIDTH if wide else WIDTH, 0.9 + (0.75 + 0.11 * lines) * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    image = None
    for axis, (model, scheme), title in zip(axes.flat, panels, titles, strict=False):
        mine = found[(found.model == model) & (found.scheme == scheme)]
        grid = mine.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
        grid = grid.reindex(index=range(depths), columns=lengths).to_numpy(dtype=float) * 100
        # seaborn's heat map would lay out the whole figure again for each panel
        image = axis.pcolormesh(grid, vmin=0, vmax=100, cmap="cividis")
        axis.set(xlim=(0, len(lengths)), ylim=(depths, 0))
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.set_title(title, fontsize=SMALL, linespacing=0.95)
        axis.grid(False)
        names = [f"{round(n / 1024, 1):g}K" for n in lengths]
        axis.set_xticks([i + 0.5 for i in range(len(lengths))], names, rotation=0)
        axis.set_yticks([0, depths / 2, depths], ["0", "50", "100"], rotation=0)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for column in range(columns):  # the lowest panel of a column shows the lengths
        *above, lowest = axes[: (len(panels) - 1 - column) // columns + 1, column]
        lowest.tick_params(labelbottom=True)
        for axis in above:
            axis.tick_params(bottom=False)
        for axis in (*above, lowest) if column else ():
            axis.tick_params(left=False)
    axes[-1][0].set_xlabel("prompt tokens")
    if image is not None:
        figure.colorbar(image, ax=axes, label="accuracy, %", location="bottom", aspect=40, pad=0.02)
    figure.supylabel("depth of the key, %", fontsize=7.5)
    return figure
