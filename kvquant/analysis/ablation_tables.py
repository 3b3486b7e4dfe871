"""The tables of ablations: accuracy, size and kernels by each value of a varied option."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from kvquant.analysis.ablation import Ablation, Choice, ablations, task_of
from kvquant.analysis.booktabs import Latex, booktabs, escape, number
from kvquant.analysis.labels import case_label, device_label
from kvquant.analysis.pareto import bits_of
from kvquant.analysis.study_tables import Tables
from kvquant.analysis.timed_on import one_device
from kvquant.study.tasks import SUITES

NAN = float("nan")
NOTHING = "Of this option fewer than two values were measured."
SIZE = ["shape", "batch", "tokens", "all_tokens"]  # columns that tell sizes of kernel cases apart


def _accuracy(t: Tables, task: str | None, model: str, scheme: str) -> dict[str, Any]:
    """Returns likelihood, its change against the baseline, divergence and bits of one scheme."""
    found: dict[str, Any] = {"bits": NAN, "value": NAN, "change": NAN, "kl": NAN}
    if task is None or not len(t.evaluations):
        return found
    chosen = (t.evaluations.model == model) & (t.evaluations.task == task)
    mine = t.evaluations[chosen & (t.evaluations.scheme == scheme)]
    if not len(mine):
        return found
    found |= {"bits": bits_of(mine), "value": float(mine.value.mean())}
    if "kl" in mine:
        found["kl"] = float(mine.kl.mean())
    base = t.evaluations[chosen & (t.evaluations.scheme == t.study.baseline)]
    pairs = mine.merge(base, on="seed", suffixes=("", "_base"))
    if len(pairs) == len(mine):
        found["change"] = float((pairs.value - pairs.value_base).mean())
    return found


def _kernels(t: Tables, scheme: str) -> list[dict[str, Any]]:
    """Returns what kernels reached by one scheme, an entry per size that was timed.

    Of several cases of one size the first stands for it.
    """
    rows = one_device(t.study, t.kernels)
    if not len(rows):
        return []
    rows = rows[(rows.scheme == scheme) & rows.measure.isin(["pack", "attention"])]
    found = []
    for size, sides in rows.groupby(SIZE, sort=False):
        pack = sides[(sides.measure == "pack") & (sides.role == "ours")].copy_share.dropna()
        fp16 = sides[(sides.measure == "attention") & (sides.role == "fp16")]
        first = fp16[fp16.case == fp16.case.iloc[0]] if len(fp16) else fp16
        found.append(
            {
                "size": case_label(str(size[0]), *map(int, size[1:])),
                "timed_on": device_label(str(sides.device.iloc[0])),
                "pack_share": float(pack.iloc[0]) if len(pack) else NAN,
                # the fastest fp16 attention is the one that a user would run
                "attention_ratio": float(first.over_ours_median.min()) if len(first) else NAN,
            }
        )
    return found


def _compared(timed: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the entries of sizes that at least two schemes have; others compare nothing."""
    counts = Counter(entry["size"] for entries in timed.values() for entry in entries)
    return {
        scheme: [entry for entry in entries if counts[entry["size"]] > 1]
        for scheme, entries in timed.items()
    }


def _of_choice(
    t: Tables, ablation: Ablation, choice: Choice, model: str, timed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the rows of one value: one, or one per size at which kernels were timed."""
    task = task_of(t.study)
    accuracy = _accuracy(t, task, model, choice.scheme)
    first = {
        "option": ablation.label,
        "value_of_option": choice.words,
        "headline": choice.scheme == t.study.headline,
        "model": model,
        "scheme": choice.scheme,
        "task": task or "",
        "metric": "" if task is None else SUITES[t.study.tasks[task].suite].label,
    }
    none = {"size": "", "timed_on": "", "pack_share": NAN, "attention_ratio": NAN}
    if not timed and pd.isna(accuracy["value"]):
        return []
    return [first | accuracy | kernels for kernels in (timed or [none])]


def rows_of(t: Tables, ablation: Ablation) -> pd.DataFrame:
    """Returns the rows of one varied option, in the order of its values, model by model.

    Args:
        t: The collected tables.
        ablation: The option.

    Returns:
        A row per model and value, and per size if kernels of two values were timed at several; a
        value of which nothing was measured has none. `headline` marks the headline scheme's.
    """
    kernels = _compared({choice.scheme: _kernels(t, choice.scheme) for choice in ablation.choices})
    rows = [
        row
        for model in t.study.models
        for choice in ablation.choices
        for row in _of_choice(t, ablation, choice, model, kernels[choice.scheme])
    ]
    return pd.DataFrame(rows)


def all_rows(t: Tables) -> pd.DataFrame:
    """Returns the rows of all options that a study varies, with keys of models and schemes."""
    tables = [rows_of(t, ablation) for ablation in ablations(t.study)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _percent(share: float) -> str:
    return "-" if pd.isna(share) else f"{100 * share:.0f} %"


def latex(t: Tables, option: str) -> str:
    """Builds the LaTeX table of one varied option.

    Args:
        t: The collected tables.
        option: The key of the option (:attr:`Ablation.option`).
    """
    (ablation,) = (found for found in ablations(t.study) if found.option == option)
    found, task = rows_of(t, ablation), task_of(t.study)
    if not len(found) or found.scheme.nunique() < 2:
        return booktabs(found.iloc[:0], "", empty=NOTHING)
    likelihood = SUITES[t.study.tasks[task].suite].label if task is not None else ""
    timed = bool((found["size"] != "").any())
    rows = []
    for r in found.itertuples():
        row: dict[str, Any] = {"model": t.labels.model(r.model)} if len(t.study.models) > 1 else {}
        value = escape(r.value_of_option)
        row["scheme"] = t.labels.scheme(r.scheme)
        row[ablation.label] = Latex(rf"\textbf{{{value}}}") if r.headline else Latex(value)
        if task is not None:
            row |= {"bits": number(r.bits), likelihood: number(r.value), "change": "-"}
            row["change"] = "-" if pd.isna(r.change) else f"{r.change:+.3f}"
            row["KL, nats"] = number(r.kl, 4)
        if timed:
            row["pack, of a copy"] = _percent(r.pack_share)
            row["attention, over ours"] = number(r.attention_ratio)
            row["kernels of"] = r.size or "-"
            row["timed on"] = r.timed_on or "-"
        rows.append(row)
    table = pd.DataFrame(rows, dtype=object)
    texts = 2 if timed else 0
    labels = 2 + (len(t.study.models) > 1)
    columns = "l" * labels + "r" * (table.shape[1] - labels - texts) + "l" * texts
    return booktabs(table, columns, size="footnotesize", tight=True)
