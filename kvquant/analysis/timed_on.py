"""Which device's timings stand for a study where one number is asked for.

A study may hold what was timed on several devices. Collected tables and the tables of the paper
show all of them, a row each. Figures, claims and the Pareto table show one device: no ratio and no
median mixes two.
"""

from __future__ import annotations

import pandas as pd

from kvquant.study.config import Study


def device_of(study: Study, timed: pd.DataFrame) -> str | None:
    """Returns the study's device if a table has rows of it, else the first that it has rows of.

    None for a table without rows.
    """
    names = list(dict.fromkeys(timed["device"])) if "device" in timed else []
    if study.device in names:
        return study.device
    return str(names[0]) if names else None


def one_device(study: Study, timed: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of one device (:func:`device_of`)."""
    device = device_of(study, timed)
    return timed if device is None else timed[timed["device"] == device]
