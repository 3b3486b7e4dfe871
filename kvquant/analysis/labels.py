"""The names of a study's models, schemes, tasks and workloads, as readers of its products see them.

Records and tables have keys. A module that shows something to a reader takes the names from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from kvquant.study.checks import RESERVED_LABELS
from kvquant.study.config import Study
from kvquant.study.jobs import JobCase
from kvquant.study.tasks import SUITES
from kvquant.study.wording import short_count, told_apart

CONCATENATION = RESERVED_LABELS[0]  # KVQuant's procedure in the measurement of appends
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Labels:
    """Names by key; a key that is not the study's stays as it is.

    Attributes:
        models: Names of models.
        schemes: Names of schemes, no two alike.
        tasks: Names of tasks, and of suites where a row is a suite's mean.
        timed: Names of workloads of throughput.
        metered: Names of workloads of energy.
    """

    models: Mapping[str, str]
    schemes: Mapping[str, str]
    tasks: Mapping[str, str]
    timed: Mapping[str, str] = field(default_factory=dict)
    metered: Mapping[str, str] = field(default_factory=dict)

    def model(self, key: str) -> str:
        """Returns the name of a model."""
        return self.models.get(key, key)

    def scheme(self, key: str) -> str:
        """Returns the name of a scheme, also of a side such as "nuq3-1pct (PyTorch)"."""
        name, more, rest = key.partition(" (")
        return self.schemes.get(name, name) + more + rest

    def task(self, key: str) -> str:
        """Returns the name of a task, or of a suite."""
        return self.tasks.get(key, key)

    def of(self, table: pd.DataFrame, *, energy: bool = False) -> pd.DataFrame:
        """Returns a table with names in place of keys.

        Args:
            table: A collected table.
            energy: Whether its workloads are those of energy.
        """
        workload = self.metered if energy else self.timed
        columns: dict[str, Mapping[str, str]] = {
            **{"model": self.models, "scheme": self.schemes, "task": self.tasks},
            **{"workload": workload, "prefill_workload": self.timed, "quality_task": self.tasks},
            "energy_workload": self.metered,
        }
        shown = table.copy()
        for column in columns.keys() & set(table.columns):
            names = columns[column]
            shown[column] = [names.get(str(key), str(key)) for key in table[column]]
        return shown


def labels_of(study: Study) -> Labels:
    """Returns the names of all that a study has."""
    tasks = told_apart(study.tasks)
    suites = {name: suite.label for name, suite in SUITES.items() if name not in tasks}
    return Labels(
        models=told_apart(study.models),
        schemes=told_apart(study.schemes, RESERVED_LABELS),
        tasks=tasks | suites,
        timed=told_apart(study.throughput.workloads),
        metered=told_apart(study.energy.workloads),
    )


def device_label(key: str) -> str:
    """Returns the name of a device by its key in paths: that of h100-80gb-hbm3 is H100 80GB HBM3.

    Keys are in lower case, so words with a digit and short ones are taken for model numbers, sizes
    and abbreviations.
    """
    words = key.split("-")
    short = 3
    return " ".join(
        word.upper() if len(word) <= short or any(map(str.isdigit, word)) else word.capitalize()
        for word in words
    )


def case_label(shape: str, batch: int, tokens: int, all_tokens: int) -> str:
    """Returns the name of a case of the kernel benchmark: shape, batch and lengths."""
    name = shape.upper().replace("-", " ")
    ragged = ", ragged" if all_tokens < batch * tokens else ""
    return f"{name} {batch} {TIMES} {short_count(tokens)}{ragged}"


def gpus_label(case: JobCase) -> str:
    """Returns how many GPUs have the model of a case of whole jobs, and how it is split."""
    return f"{case.num_gpus} GPUs" + (" by heads" if case.split == "heads" else "")


def job_label(case: JobCase) -> str:
    """Returns the name of a case of whole jobs: shape, prompts, answers, GPUs, memory, decoding."""
    name = case.shape.upper().replace("-", " ")
    prompts = f"{case.batch_size} {TIMES} " if case.batch_size is not None else ""
    lengths = f"{prompts}{short_count(case.prompt)} + {short_count(case.answer)}"
    gpus = f" on {gpus_label(case)}" if case.num_gpus > 1 else ""
    memory = "" if case.memory_gb is None else f" in {case.memory_gb:g} GB"
    memory += " each" if memory and gpus else ""
    generated = ", generate" if case.decode == "generate" else ""
    searched = ", longest prompt" if case.context else ""
    return f"{name} {lengths}{gpus}{memory}{generated}{searched}"
