"""The loss of one scheme over another's."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kvquant.analysis.loss_ratio import loss_ratio


def rows(**losses: list[float]) -> pd.DataFrame:
    """Results of a task: 20 and the loss of each scheme, by seed."""
    found = [
        {"scheme": scheme, "seed": seed, "value": 20 + loss, "bits_per_element": len(scheme)}
        for scheme, values in {"fp16": [0.0] * 3, **losses}.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(found)


def test_the_mean_of_the_seeds_ratios_and_its_interval() -> None:
    found = loss_ratio(rows(ours=[1, 2, 3], other=[2, 8, 6]), "ours", "other", "fp16", 0.05)
    assert found is not None and found.seeds == 3 and found.lossless == 0
    ratios = np.array([1 / 2, 2 / 8, 3 / 6])
    low, high = stats.t.interval(0.95, 2, ratios.mean(), stats.sem(ratios))
    assert (found.mean, found.low, found.high) == pytest.approx((ratios.mean(), low, high))
    assert (found.bits, found.other_bits) == (4, 5)


def test_no_ratio_to_a_scheme_that_lost_nothing() -> None:
    found = loss_ratio(rows(ours=[1, 2, 3], other=[2, 0, 6]), "ours", "other", "fp16", 0.05)
    assert found is not None and found.lossless == 1 and np.isnan(found.mean)


def test_seeds_of_one_scheme_alone_do_not_count() -> None:
    found = loss_ratio(rows(ours=[1, 2], other=[2, 4, 6]), "ours", "other", "fp16", 0.05)
    assert found is not None and found.seeds == 2 and found.mean == 0.5
    assert loss_ratio(rows(ours=[1]), "ours", "other", "fp16", 0.05) is None
