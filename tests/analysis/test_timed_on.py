"""What was timed on several devices: all rows in tables, one device in ratios, figures, claims."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from kvquant.analysis.claims import judge
from kvquant.analysis.cost_tables import energy, throughput
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.plot import draw_figure
from kvquant.analysis.study_tables import load_tables
from kvquant.analysis.tables import read_table, write_table
from kvquant.analysis.timed_on import device_of, one_device
from kvquant.study.config import Study, parse_study
from tests.support.tables import two_models, write_tables


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    return parse_study(two_models(root, device="gpu"))


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of a study that was timed on the device `gpu`, and twice as fast on `other`."""
    folder = tmp_path_factory.mktemp("tables")
    write_tables(study, folder)
    for name, columns in (
        ("perf", ["prefill_ratio", "decode_ratio"]),
        ("energy", ["energy_ratio"]),
    ):
        table = read_table(folder, name)
        other = table.assign(device="other", **{c: table[c] * 2 for c in columns})
        write_table(pd.concat([other, table], ignore_index=True), folder / f"{name}.parquet")
    return folder


def test_one_device_is_the_studys_or_the_first(study: Study, folder: Path) -> None:
    perf = read_table(folder, "perf")
    assert device_of(study, perf) == "gpu"
    assert set(one_device(study, perf).device) == {"gpu"}
    elsewhere = study.model_copy(update={"device": "h200"})
    assert device_of(elsewhere, perf) == "other"
    assert device_of(study, perf[:0]) is None and one_device(study, perf[:0]).empty


def test_ratios_are_of_one_device(study: Study, folder: Path) -> None:
    perf, energies = read_table(folder, "perf"), read_table(folder, "energy")
    alone = [table[table.device == "gpu"] for table in (perf, energies)]
    evaluations = read_table(folder, "eval")
    found = pareto_table(study, evaluations, perf, energies)
    pd.testing.assert_frame_equal(found, pareto_table(study, evaluations, *alone))
    assert set(found.timed_on) == set(found.metered_on) == {"gpu"}


def test_claims_are_of_one_device_and_name_it(study: Study, folder: Path) -> None:
    claims = judge(load_tables(study, folder)).set_index("claim")
    speed = claims.loc["Prefill at fp16 speed"]
    assert (speed.device == "gpu").all()
    elsewhere = study.model_copy(update={"device": "other"})
    other = judge(load_tables(elsewhere, folder)).set_index("claim").loc["Prefill at fp16 speed"]
    assert (other.device == "other").all()
    assert (speed.value.to_numpy() != other.value.to_numpy()).all()


def test_tables_show_every_device(study: Study, folder: Path) -> None:
    tables = load_tables(study, folder)
    for build, table in ((throughput, tables.perf), (energy, tables.energy)):
        text = build(tables)
        assert "device" in text
        assert text.count("other") == text.count("gpu") == len(table) // 2


def test_figures_name_their_device(study: Study, folder: Path) -> None:
    def label(name: str) -> str:
        figure = draw_figure(name, study, folder)
        return figure.get_supxlabel() or figure.axes[-1].get_xlabel()

    assert label("pareto").endswith("\nmeasured on GPU")
    assert label("throughput").endswith(", measured on GPU")
    assert "measured on" not in label("perplexity")


def test_a_figure_without_a_measurement_says_so(study: Study, folder: Path, tmp_path: Path) -> None:
    for name in ("perf", "energy", "eval", "tests"):
        table = read_table(folder, name)
        write_table(table[:0] if name == "perf" else table, tmp_path / f"{name}.parquet")
    figure = draw_figure("throughput", study, tmp_path)
    (text,) = figure.axes[0].texts
    assert text.get_text().startswith("Nothing is measured yet: prefill and decode")
