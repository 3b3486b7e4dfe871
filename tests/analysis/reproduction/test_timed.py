"""Timed results: ratios are judged, what belongs to a device is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.analysis.reproduction.timed import EXTRACT
from kvquant.study.cells import STAGES
from kvquant.study.config import Study
from kvquant.study.records import JobRecord, JobSide
from tests.support.reproductions import measured_otherwise, reproduce, rows_of
from tests.support.studies import study_of


def test_every_timed_stage_has_its_quantities() -> None:
    assert set(EXTRACT) == set(STAGES) - {"eval"}


def test_an_energy_that_was_estimated_is_not_judged(
    study: Study, own: Path, tmp_path: Path
) -> None:
    def estimated(record: dict[str, object], rows: object) -> None:
        record |= {"source": "estimated", "method": "estimate by use"}

    file = own / "energy/gpu/tiny/nuq3/short/rep0.json"
    measured_otherwise(file, estimated)
    assert reproduce(study, tmp_path, own) == 0
    rows = rows_of(tmp_path, "energy over baseline", "short", "nuq3")
    found = dict(zip(rows["what"], rows["verdict"], strict=True))
    assert found == {"short, repetition 0": "not judged", "short, repetition 1": "reproduced"}
    assert set(rows_of(tmp_path, "energy")["verdict"]) == {"not judged"}


def test_a_slower_append_differs_by_its_ratio(study: Study, own: Path, tmp_path: Path) -> None:
    def slower(record: dict[str, object], rows: object) -> None:
        for point in record["points"]:  # type: ignore[attr-defined]
            if point["series"] == "nuq3":
                times = point["token_ms"]
                times |= {name: 2 * times[name] for name in ("median", "p10", "p90", "p99")}

    measured_otherwise(own / "append/gpu/rep0.json", slower)
    assert reproduce(study, tmp_path, own) == 0
    rows = rows_of(tmp_path, "append time over baseline", "append, repetition 0, nuq3")
    assert set(rows["verdict"]) == {"differs"}
    assert rows["difference"].to_list() == pytest.approx([1.0, 1.0])
    others = rows_of(tmp_path, "append time over baseline", "append, repetition 1")
    assert set(others["verdict"]) == {"reproduced"}


def test_jobs_are_ratios_over_the_unquantized_cache() -> None:
    study = study_of()

    def side(scheme: str, **more: object) -> JobSide:
        return JobSide.model_validate({"scheme": scheme, "status": "ok"} | more)

    sides = [
        side("nuq3", job_tokens_per_s=30.0, joules_per_token=0.5, capacity_tokens=400),
        side("fp16", job_tokens_per_s=10.0, joules_per_token=1.0, capacity_tokens=100),
    ]
    record = JobRecord(
        study="check", spec_digest="0" * 16, device="gpu", case="one", shape="tiny", prompt=8,
        answer=2, memory_bytes=1, emulated=False, weight_bytes=1, source="nvml", sides=sides,
        seconds=1.0,
    )  # fmt: skip
    found = {v.quantity: v.value for v in EXTRACT["jobs"](study, record) if "over" in v.quantity}
    assert found == {
        "job speed over baseline": 3.0,
        "job energy over baseline": 0.5,
        "tokens held over baseline": 4.0,
    }
