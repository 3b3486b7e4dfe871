"""The verbs that load a model of which the study says `gpus: 2`, on a machine of pretended GPUs.

CUDA shows the boards 2, 0 and 1, in this order, and another process uses the first of these. The
verbs must take the other two, which are 0 and 1 on the bus, for all that they do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.calibration import collect
from kvquant.cli import main
from kvquant.energy import monitor
from kvquant.errors import UserError
from kvquant.models import base_model
from kvquant.models.placement import layer_devices
from kvquant.runtime import devices
from kvquant.study.records import EnergyRecord, EvalRecord, ThroughputRecord, read_record
from tests.support.pipeline import measured_folder
from tests.support.pretend_machine import FASTER, NAME, Machine, pretend_machine

WATTS = (100.0, 300.0, 1000.0)  # of the boards in the order of the bus
SHOWN = (2, 0, 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of which the shared stages have run, with a study of two GPUs per model."""
    folder = measured_folder(tmp_path_factory.mktemp("several"))
    study = json.loads((folder / "study.json").read_text())
    study |= {"device": NAME, "gpus": 1}
    study["models"]["tiny"] |= {"gpus": 2, "dtype": "float32"}
    (folder / "study.json").write_text(json.dumps(study))
    return folder


@pytest.fixture()
def machine(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The machine, on whose first visible GPU another process runs."""

    def fails(self: Any) -> Any:
        raise ImportError("not installed")  # CodeCarbon starts slowly

    monkeypatch.setattr("kvquant.energy.carbon.CarbonTracker._open", fails)
    with pretend_machine(tmp_path, WATTS, SHOWN) as found:
        with devices.one_at_a_time(found.locks):
            devices._hold(found.locks, "02", ".shared")
        (file,) = devices._held
        handle = devices._held.pop(file)
        yield found
        handle.close()


@pytest.fixture()
def placed(monkeypatch: pytest.MonkeyPatch) -> list[list[int | None]]:
    """The GPU of each layer of every model that was spread."""
    found: list[list[int | None]] = []
    plain = base_model.spread

    def seen(model: Any, where: Any) -> Any:
        spread = plain(model, where)
        found.append([device.index for device in layer_devices(spread)])
        return spread

    monkeypatch.setattr(base_model, "spread", seen)
    return found


def words(work: Path, scheme: str, device: str = "cuda") -> list[str]:
    """Options of all verbs."""
    found = ["--study", str(work / "study.json"), "--model", "tiny", "--scheme", scheme]
    found += ["--model-manifest", str(work / "model.json"), "--device", device]
    return [*found, "--data-manifest", str(work / "data.json")]


def loss(work: Path, out: Path, device: str) -> EvalRecord:
    """Evaluates one seed on perplexity."""
    given = [*words(work, "kivi-2", device), "--task", "ppl-a", "--seeds", "0"]
    assert main(["evaluate", *given, "--out-dir", str(out)]) == 0
    return read_record(out / "seed0/run.json", EvalRecord)


def test_an_evaluation_is_that_of_one_gpu(
    measured: Path, machine: Machine, placed: list[Any], tmp_path: Path
) -> None:
    two = loss(measured, tmp_path / "two", "auto")
    one = loss(measured, tmp_path / "one", "cuda:0")
    assert placed == [[1, 2], [0, 0]]
    assert machine.current == [1, 0]
    assert (two.value, two.cache_bytes) == (one.value, one.cache_bytes)
    assert (two.spec_digest, two.inputs) == (one.spec_digest, one.inputs)
    assert [len(record.environment["gpus"]) for record in (two, one)] == [2, 1]
    assert sorted(f.name.split(".")[0] for f in machine.locks.glob("*.shared")) == [
        "00", "01", "02", "02",
    ]  # fmt: skip


def test_calibration_spreads_the_model(
    measured: Path, machine: Machine, placed: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Torch's backward pass cannot be pretended: `models/test_several_gpus.py` runs it on GPUs."""
    seen: list[Any] = []

    def stop(model: Any, *args: Any, **more: Any) -> Any:
        seen.append(layer_devices(model))
        raise UserError("calibration would start")

    monkeypatch.setattr(collect, "calibrate", stop)
    given = words(measured, "kivi-2")
    at = given.index("--scheme")
    out = ["--out", str(tmp_path / "stats.safetensors")]
    assert main(["calibrate", *given[:at], *given[at + 2 :], *out]) == 2
    assert placed == [[1, 2]] and seen == [[torch.device("cuda", 1), torch.device("cuda", 2)]]
    assert sorted(f.name.split(".")[0] for f in machine.locks.glob("*.shared"))[:2] == ["00", "01"]


def timed(work: Path, verb: str, out: Path, *more: str) -> int:
    """Runs a timed verb."""
    workload = {"throughput": "p64", "energy": "p32"}[verb]
    given = [*words(work, "kivi-2"), "--device-name", NAME, "--rep", "0", *more]
    return main([verb, *given, "--workload", workload, "--out", str(out)])


def test_throughput_has_both_gpus_alone(
    measured: Path, machine: Machine, placed: list[Any], tmp_path: Path
) -> None:
    assert timed(measured, "throughput", tmp_path / "rep0.json") == 0
    record = read_record(tmp_path / "rep0.json", ThroughputRecord)
    assert placed == [[1, 2]] and machine.current == [1]
    assert len(record.environment["gpus"]) == 2
    assert record.scheme_side.peak_bytes == 1000 * (2 + 3)  # the sum over both
    assert sorted(f.name.split(".")[0] for f in machine.locks.glob("*.alone")) == ["00", "01"]


def test_energy_is_that_of_both_gpus_and_no_other(
    measured: Path, machine: Machine, placed: list[Any], tmp_path: Path
) -> None:
    meters: list[Any] = []
    plain = monitor.NvmlMeter

    class Kept(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            meters.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "NvmlMeter", Kept)
        assert timed(measured, "energy", tmp_path / "rep0.json") == 0
    record = read_record(tmp_path / "rep0.json", EnergyRecord)
    assert placed == [[1, 2]]
    assert record.source == "nvml" and "counter of 2 GPU(s)" in record.method
    assert meters[0].indices == [0, 1]  # as NVML and CodeCarbon number the boards
    assert record.idle_watts / FASTER == pytest.approx(WATTS[0] + WATTS[1], rel=0.05)
    for side in (record.scheme_side, record.baseline_side):
        watts = sum(side.joules) / sum(side.seconds) / FASTER
        assert watts == pytest.approx(WATTS[0] + WATTS[1], rel=0.1)
    idle = record.telemetry["idle_gpus"]
    assert idle == {"names": {"NVIDIA H100 80GB HBM3": 1}, "watts": WATTS[2]}
    assert len(record.environment["gpus"]) == 2


@pytest.mark.parametrize("verb", ["throughput", "energy"])
def test_timing_three_gpus_waits_for_the_one_in_use(
    verb: str, measured: Path, machine: Machine, tmp_path: Path, capsys: Any
) -> None:
    study = json.loads((measured / "study.json").read_text())
    study["models"]["tiny"]["gpus"] = 3
    for name in ("model.json", "data.json"):
        (tmp_path / name).write_text((measured / name).read_text())
    (tmp_path / "study.json").write_text(json.dumps(study))
    assert timed(tmp_path, verb, tmp_path / "rep0.json") == 2
    assert "1 other process(es) of kvquant use 3 of these 3 GPUs" in capsys.readouterr().err


def test_more_gpus_than_there_are_is_one_line(
    measured: Path, machine: Machine, tmp_path: Path, capsys: Any
) -> None:
    study = json.loads((measured / "study.json").read_text())
    study["models"]["tiny"]["gpus"] = 4
    file = tmp_path / "study.json"
    file.write_text(json.dumps(study))
    given = words(measured, "kivi-2")
    given[1] = str(file)
    given += ["--task", "ppl-a", "--seeds", "0", "--out-dir", str(tmp_path / "out")]
    assert main(["evaluate", *given]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("kvquant: error")]
    (line,) = lines
    assert "models.tiny.gpus: 4 GPUs are asked for, but 3 can be seen; ask for fewer" in line
