"""Whole jobs on a tiny model.

Also covers: benchmarks.job_runner, benchmarks.job_side, study.jobs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from kvquant.benchmarks import job_side, jobs
from kvquant.benchmarks.job_runner import Runner, turns
from kvquant.benchmarks.job_side import JobSide, JobTimes
from kvquant.benchmarks.random_model import RandomModel
from kvquant.benchmarks.team import Team
from kvquant.cli import main
from kvquant.errors import OutlierOverflow, UserError
from kvquant.runtime import devices
from kvquant.runtime.provenance import device_name
from kvquant.study.jobs import JobCase, JobsSpec
from kvquant.study.record_checks import check_record
from kvquant.study.records import JobRecord, read_record
from kvquant.study.schemes import (
    AllocatedScheme,
    Fp16Scheme,
    Fp16StaticScheme,
    Int4HadamardScheme,
    NuqScheme,
    Scheme,
)
from tests.support import pretend_machine
from tests.support.studies import study_of

CASE: dict[str, Any] = {
    "shape": "tiny",
    "prompt": 96,
    "answer": 5,
    "batch_size": 2,
    "schemes": ["fp16", "nuq3"],
    "trials": 2,
}


def study_file(folder: Path, case: dict[str, Any], **options: Any) -> Path:
    """A study with one case named `tiny`."""
    study = study_of(
        jobs={"cases": {"tiny": case}, "seconds": 0.05, "idle_seconds": 0.1, **options}
    )
    file = folder / "study.json"
    file.write_text(study.model_dump_json())
    return file


def bench(folder: Path, case: dict[str, Any], **options: Any) -> tuple[int, Path]:
    """Runs the case as the workflow does."""
    out = folder / "tiny.json"
    words = [
        "bench",
        "jobs",
        "--study",
        str(study_file(folder, case, **options)),
        "--cases",
        "tiny",
    ]
    words += ["--device-name", "cpu", "--device", "cpu", "--out-dir", str(folder)]
    return main(words), out


def test_a_case_is_one_record(tmp_path: Path) -> None:
    code, out = bench(tmp_path, CASE | {"energy": True})
    assert code == 0
    record = read_record(out, JobRecord)
    assert [side.scheme for side in record.sides] == CASE["schemes"]
    for side in record.sides:
        assert side.status == "ok"
        assert len(side.trials) == 2
        assert side.batch_size == 2
        assert side.step_ms is not None
        assert side.step_ms.n == 5 * sum(trial.jobs for trial in side.trials)
        assert side.joules_per_token is not None
    base, ours = record.sides
    assert ours.cache_elements == base.cache_elements == 2 * 2 * 96 * 64 * 2
    assert base.bits_per_element == 16
    assert record.source == "estimated"
    assert out.with_suffix(".csv").read_text().startswith("seconds,label,joules")


def test_without_energy_nothing_is_metered(tmp_path: Path) -> None:
    code, out = bench(tmp_path, CASE | {"trials": 1})
    assert code == 0
    record = read_record(out, JobRecord)
    assert record.source is None
    assert record.sides[0].joules_per_token is None
    assert not out.with_suffix(".csv").exists()


@pytest.mark.parametrize(
    "change",
    [{"batch_size": None}, {"capacity": True}, {"context": True}, {"memory_gb": 24.0}],
    ids=str,
)
def test_what_fits_is_searched_on_a_gpu_only(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, CASE | change)[0] == 2
    assert "what fits in memory is searched on a GPU" in capsys.readouterr().err


def test_an_unknown_case_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = study_file(tmp_path, CASE)
    words = ["bench", "jobs", "--study", str(file), "--cases", "tinny", "--device-name", "cpu"]
    assert main([*words, "--out-dir", str(tmp_path)]) == 2
    assert "did you mean tiny" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "measure", lambda *args: pytest.fail("measured"))
    file = study_file(tmp_path, CASE)
    words = ["bench", "jobs", "--study", str(file), "--device-name", "cpu", "--device", "cpu"]
    assert main([*words, "--out-dir", str(file)]) == 2
    assert "--out-dir: " in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a user who is not root
    assert main([*words, "--out-dir", str(tmp_path)]) == 2
    assert f"--out-dir: {tmp_path}: cannot be written" in capsys.readouterr().err


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match=r"jobs\.cases\.tiny\.schemes: 'nuq9'"):
        study_of(jobs={"cases": {"tiny": CASE | {"schemes": ["nuq9"]}}})


class Limited(JobSide):
    """A side whose GPU holds 220 tokens."""

    held = 0

    def prefill_one(self, row: int, tokens: int) -> tuple[Any, torch.Tensor]:
        """Fails as a GPU does that has no more memory."""
        if row * self.case.prompt + tokens > 220:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().prefill_one(row, tokens)


class LimitedContext(JobSide):
    """A side whose GPU holds 5,000 tokens of one prompt, allocated or written."""

    calls: list[tuple[int, int]]

    def _call(self, cache: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        end = start + ids.shape[1]
        self.calls.append((start, end))
        if end > 5000:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super()._call(cache, ids, start)


Side = TypeVar("Side", bound=JobSide)
NUQ3 = NuqScheme(kind="nuq", bits=3, outliers=0.01)


def side(kind: type[Side], scheme: Scheme = NUQ3, **changes: Any) -> Side:
    """A side of a tiny random model."""
    model = RandomModel("tiny", torch.device("cpu"))
    return kind("side", model.with_scheme(scheme), JobCase(**CASE | changes))


def test_the_last_prompt_is_shortened_to_what_fits() -> None:
    whole, tokens = side(Limited).tokens_that_fit()
    assert whole == 2
    assert 220 - 2 < tokens <= 220


def test_the_largest_batch_is_found() -> None:
    found = side(Limited)
    batch, seconds = found.largest_batch(4)
    assert batch == 2 and seconds > 0
    assert found.largest_batch(4, fewer=False) == (0, 0.0)
    assert side(Limited, prompt=300).largest_batch(3) == (0, 0.0)


def test_prompts_are_the_same_for_every_cache_and_each_other_differs() -> None:
    one, other = side(JobSide), side(JobSide)
    assert torch.equal(one._ids(0, 50), other._ids(0, 50))
    assert not torch.equal(one._ids(0, 50), one._ids(1, 50))


def test_lost_outliers_are_answered_by_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvquant.cache.kvquant_cache import KVQuantCache
    from kvquant.errors import OutlierOverflow

    calls = []

    def settle(self: KVQuantCache) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise OutlierOverflow("outliers: 3 found no room")

    monkeypatch.setattr(KVQuantCache, "settle", settle)
    widened: list[KVQuantCache] = []
    monkeypatch.setattr(KVQuantCache, "widen", lambda self: widened.append(self))
    times = JobTimes()
    side(JobSide).prefill(1, times)
    assert widened == calls[:1]
    assert len(times.first_token_ms) == 1


def test_answers_by_generate(tmp_path: Path) -> None:
    code, out = bench(tmp_path, CASE | {"decode": "generate", "trials": 1})
    assert code == 0
    for found in read_record(out, JobRecord).sides:
        assert found.decoder == "generate"
        assert found.step_ms is not None
        assert found.step_ms.n == 5


def test_a_batch_that_no_longer_fits_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(side(JobSide, batch_size=None), JobsSpec(cases={"tiny": JobCase(**CASE)}), None)
    runner.batch, calls, plain = 3, [], JobSide.job

    def job(self: JobSide, batch: int, *args: Any) -> JobTimes:
        calls.append(batch)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch, *args)

    monkeypatch.setattr(JobSide, "job", job)
    turns([runner], 2, None)
    assert calls == [3, 3, 2, 2]
    assert runner.record(None, None).batch_size == 2
    assert len(runner.trials) == 2


@pytest.mark.parametrize(
    "scheme", [NUQ3, Fp16Scheme(kind="fp16"), Fp16StaticScheme(kind="fp16-static")], ids=str
)
def test_the_longest_prompt_is_what_its_calls_held(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_side, "CONTEXT_CHUNK", 1024)
    limited = side(LimitedContext, scheme)
    limited.calls = []
    assert limited.longest_context() == 4096
    assert {end - start for start, end in limited.calls} == {1024}
    last = max(place for place, call in enumerate(limited.calls) if call == (3072, 4096))
    assert limited.calls[last - 3 : last] == [(0, 1024), (1024, 2048), (2048, 3072)]


def test_a_prompt_that_loses_outliers_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_side, "CONTEXT_CHUNK", 1024)
    limited = side(LimitedContext)
    limited.calls, lost, call = [], [True], LimitedContext._call

    def losing(self: Any, cache: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        if start == 1024 and lost:
            lost.clear()
            raise OutlierOverflow("no room")
        return call(self, cache, ids, start)

    monkeypatch.setattr(LimitedContext, "_call", losing)
    assert limited.longest_context() == 4096
    assert [start for start, _ in limited.calls] == [0, 0, 1024, 2048, 3072, 4096]


@pytest.fixture()
def no_carbon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves CodeCarbon's slow start out."""

    def fails(self: Any) -> Any:
        raise ImportError("not installed")

    monkeypatch.setattr("kvquant.energy.carbon.CarbonTracker._open", fails)


def on_gpus(folder: Path, case: dict[str, Any], device: str = "cuda") -> int:
    """Runs a case by `kvquant bench jobs` on a GPU."""
    schemes = {"fp16": {"kind": "fp16"}, "fp16-static": {"kind": "fp16-static"}}
    schemes["nuq3"] = NUQ3.model_dump(mode="json")
    study = study_of(
        gpus=1,
        schemes=schemes,
        jobs={"cases": {"tiny": case}, "seconds": 0.05, "idle_seconds": 0.1},
    )
    file = folder / "study.json"
    file.write_text(study.model_dump_json())
    words = ["bench", "jobs", "--study", str(file), "--device-name", pretend_machine.NAME]
    return main([*words, "--device", device, "--out-dir", str(folder)])


SEVERAL = CASE | {"gpus": 2, "schemes": ["fp16", "fp16-static", "nuq3"], "trials": 1}


def test_a_case_of_two_gpus(tmp_path: Path, no_carbon: None) -> None:
    """CUDA shows three boards, in another order than the bus; the first two are taken."""
    watts = (100.0, 1000.0, 300.0)
    with pretend_machine.pretend_machine(tmp_path, watts, (2, 0, 1)) as machine:
        assert on_gpus(tmp_path, SEVERAL | {"energy": True, "memory_gb": 24.0}) == 0
        assert sorted(f.name.split(".")[0] for f in machine.locks.glob("*.alone")) == ["00", "02"]
    # each GPU was limited, and is no longer
    assert machine.limits == {0: [24 / 80, 1.0], 1: [24 / 80, 1.0]}
    record = read_record(tmp_path / "tiny.json", JobRecord)
    assert (record.gpus, len(record.environment["gpus"])) == (2, 2)
    assert record.memory_bytes == 2 * 24 * 10**9 and record.emulated
    assert record.idle_watts is not None
    assert record.idle_watts / pretend_machine.FASTER == pytest.approx(400.0, rel=0.05)
    assert "of 2 GPU(s)" in record.method
    assert record.telemetry["idle_gpus"]["watts"] == 1000.0
    for side in record.sides:
        assert side.status == "ok" and side.decoder == "from Python"
        assert (side.peak_bytes, side.steady_bytes) == (3000, 300)
        assert side.gpu_peak_bytes == [1000, 2000]
        assert side.formula_tokens is not None
    one = RandomModel("tiny", torch.device("cpu")).weight_bytes // 2  # in fp16
    assert record.weight_bytes == one
    for peaks in ([1000], [1000, 1000], [1000, 2000, 0]):
        record.sides[0].gpu_peak_bytes = peaks
        with pytest.raises(ValueError, match="gpu_peak_bytes': are not those of 2 GPUs"):
            check_record(record)


SHARED = SEVERAL | {"shape": "tiny-gqa", "split": "heads"}


def test_processes_that_share_a_model_get_the_gpus_that_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The process that starts them claims the GPUs, and takes none of their memory."""
    started: list[Any] = []

    def stop(work: Any, args: tuple[Any, ...], used: list[torch.device], name: str) -> None:
        started.append((work, args[1:], [device.index for device in used], name))
        raise UserError("the processes would start")

    monkeypatch.setattr(jobs, "run_processes", stop)
    with pretend_machine.pretend_machine(tmp_path, (100.0, 1000.0, 300.0), (2, 0, 1)) as machine:
        with devices.one_at_a_time(machine.locks):
            devices._hold(machine.locks, "02", ".shared")  # another process has the first one
        (file,) = devices._held
        handle = devices._held.pop(file)
        assert on_gpus(tmp_path, SHARED) == 2
        handle.close()
        locks = sorted(f.name.split(".")[0] for f in machine.locks.glob("*.alone"))
    file = tmp_path / "tiny.json"
    case = ("tiny", pretend_machine.NAME, file)
    assert started == [(jobs.share_of_case, case, [1, 2], "tiny")]
    assert locks == ["00", "01"] and machine.current == []
    assert "the processes would start" in capsys.readouterr().err


class Two(Team):
    """The first of two processes, of which the second says the same."""

    size = 2

    def gathered(self, value: Any) -> list[Any]:
        """Says it twice."""
        return [value, value]


def test_the_first_process_counts_what_all_have(tmp_path: Path, no_carbon: None) -> None:
    """Energy of both boards, and memory, weights and caches of both processes."""
    case = SHARED | {"energy": True, "memory_gb": 24.0, "capacity": False}
    schemes = {"fp16": {"kind": "fp16"}, "nuq3": NUQ3.model_dump(mode="json")}
    study = study_of(
        gpus=1,
        schemes=schemes,
        jobs={
            "cases": {"tiny": case | {"schemes": ["fp16", "nuq3"]}},
            "seconds": 0.05,
            "idle_seconds": 0.1,
        },
    )
    with pretend_machine.pretend_machine(tmp_path):
        model = RandomModel("tiny", torch.device("cuda", 0))
        record, _ = jobs.measure(study, "tiny", model, pretend_machine.NAME, Two())
    assert (record.split, record.gpus, len(record.environment["gpus"])) == ("heads", 2, 2)
    assert record.memory_bytes == 2 * 24 * 10**9
    assert record.weight_bytes == 2 * model.weight_bytes
    assert record.idle_watts is not None and "of 2 GPU(s)" in record.method
    assert record.idle_watts / pretend_machine.FASTER == pytest.approx(400.0, rel=0.05)
    for found in record.sides:
        assert found.gpu_peak_bytes == [1000, 1000] and found.peak_bytes == 2000
        assert found.steady_bytes == 200
        assert found.cache_elements == 2 * (2 * 2 * 96 * 64 * 2)
        joules = sum((t.prefill_joules or 0) + (t.decode_joules or 0) for t in found.trials)
        watts = joules / sum(t.prefill_seconds + t.decode_seconds for t in found.trials)
        assert watts / pretend_machine.FASTER == pytest.approx(400.0, rel=0.3)
    check_record(record)


def test_answers_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    with pretend_machine.pretend_machine(tmp_path):
        zero, one = (torch.device("cuda", index) for index in (0, 1))
        spread, alone = RandomModel("tiny", [zero, one]), RandomModel("tiny", zero)
        assert spread.layers_on(zero) == [0] and spread.layers_on(one) == [1]
        assert spread.bytes_on(zero) + spread.bytes_on(one) == spread.weight_bytes
        for mine, theirs in zip(alone.model.parameters(), spread.model.parameters(), strict=True):
            mine.copy_(theirs)
        found = []
        for model in (alone, spread):
            torch.manual_seed(1)  # the sample from which key ranges are taken
            side = JobSide("nuq3", model.with_scheme(NUQ3), JobCase(**CASE))
            assert side.devices == model.devices
            cache, token = side.prefill(2, JobTimes())
            side.devices = [zero, one]  # no graph can be captured here
            name, step = side._decoder(cache, 2)
            cache.graphs, answers = False, [token.cpu()]
            assert name == "from Python"
            for _ in range(4):
                logits = step(token)
                token = logits.argmax(-1, keepdim=True)
                answers.append(logits.cpu())
            found.append(answers)
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, atol=0, rtol=0)


def test_what_fits_on_several_gpus_is_what_fits_on_the_fullest(tmp_path: Path) -> None:
    with pretend_machine.pretend_machine(tmp_path):
        zero, one = (torch.device("cuda", index) for index in (0, 1))
        model = RandomModel("tiny", [zero, one])
        scheme = Fp16Scheme(kind="fp16")
        per_token = 2 * 2 * 64  # keys and values of one layer: one head of 64 channels in 16 bits
        room = {zero: model.bytes_on(zero) + 96 * per_token * 10, one: 10**9}
        assert model.tokens_that_fit(scheme, 96, room) == 96 * 10
        assert model.tokens_that_fit(Int4HadamardScheme(kind="int4-hadamard"), 96, room) is None


@pytest.mark.parametrize(
    ("case", "device", "message"),
    [
        (
            SEVERAL,
            "cuda:1",
            "jobs.cases.tiny.gpus: 2 GPUs are asked for, but --device cuda:1 is one device",
        ),
        (
            SEVERAL | {"shape": "7b-mha", "gpus": 5},
            "cuda",
            "jobs.cases.tiny.gpus: 5 GPUs are asked for, but 2 of the name h100-80gb-hbm3 can be",
        ),
    ],
)
def test_gpus_that_are_not_there(
    case: dict[str, Any], device: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    with pretend_machine.pretend_machine(tmp_path):
        assert on_gpus(tmp_path, case, device) == 2
    assert message in capsys.readouterr().err


def test_several_gpus_need_gpus(tmp_path: Path, capsys: Any) -> None:
    assert bench(tmp_path, CASE | {"gpus": 2})[0] == 2
    assert "2 GPUs are asked for, but --device cpu is one device" in capsys.readouterr().err


def test_more_gpus_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"jobs\.cases\.tiny: gpus: at most one per layer.* has 2"):
        study_of(jobs={"cases": {"tiny": CASE | {"gpus": 3}}})


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@TWO_GPUS
def test_a_case_of_two_real_gpus(tmp_path: Path, no_carbon: None) -> None:
    case = SEVERAL | {"energy": True, "memory_gb": 4.0, "prompt": 2048}
    study = study_file(tmp_path, case | {"schemes": ["fp16", "nuq3"]})
    words = ["bench", "jobs", "--study", str(study), "--device-name", device_name()]
    assert main([*words, "--device", "cuda", "--out-dir", str(tmp_path)]) == 0
    record = read_record(tmp_path / "tiny.json", JobRecord)
    assert (record.gpus, len(record.environment["gpus"]), record.source) == (2, 2, "nvml")
    assert 4e9 < record.memory_bytes < 8e9  # of each what torch may allocate
    for side in record.sides:
        assert side.decoder == "from Python" and side.peak_bytes and side.steady_bytes
        assert side.formula_tokens


@pytest.mark.gpu
@TWO_GPUS
def test_a_case_by_heads_of_two_real_gpus(tmp_path: Path) -> None:
    """Two processes, which find together what fits."""
    case = SHARED | {"shape": "8b-gqa", "energy": True, "memory_gb": 16.0, "prompt": 2048}
    case |= {"capacity": True, "batch_size": None, "schemes": ["fp16", "nuq3"]}
    study = study_file(tmp_path, case)
    words = ["bench", "jobs", "--study", str(study), "--device-name", device_name()]
    assert main([*words, "--device", "cuda", "--out-dir", str(tmp_path)]) == 0
    record = read_record(tmp_path / "tiny.json", JobRecord)
    assert (record.gpus, record.split, record.source) == (2, "heads", "nvml")
    assert len(record.environment["gpus"]) == 2
    assert 16e9 < record.weight_bytes < 20e9
    for side in record.sides:
        assert side.status == "ok" and side.decoder == "from Python"
        assert side.gpu_peak_bytes is not None and len(side.gpu_peak_bytes) == 2
        assert max(side.gpu_peak_bytes) < 16e9
        assert side.capacity_tokens and side.formula_tokens
    fp16, ours = record.sides
    assert ours.capacity_tokens > 2 * fp16.capacity_tokens  # type: ignore[operator]


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("scheme", ["fp16", "nuq3", "allocated"])
def test_a_13b_shape_over_two_gpus_gives_the_logits_of_one(scheme: str) -> None:
    """To rounding: the kernels are the same, and so are the weights."""
    specs: dict[str, Any] = {
        "fp16": Fp16Scheme(kind="fp16"),
        "nuq3": NUQ3,
        "allocated": AllocatedScheme(kind="allocated", bits=3.4),
    }
    zero, one = (torch.device("cuda", index) for index in (0, 1))
    torch.cuda.set_device(zero)
    spread = RandomModel("13b-mha", [zero, one])
    alone = RandomModel("13b-mha", zero)
    assert len(spread.layers_on(zero)) == len(spread.layers_on(one)) == 20
    share = spread.bytes_on(zero) / spread.weight_bytes
    assert 0.49 < share < 0.51
    with torch.no_grad():
        for mine, theirs in zip(alone.model.parameters(), spread.model.parameters(), strict=True):
            mine.copy_(theirs)
    found = []
    for model in (alone, spread):
        torch.manual_seed(1)  # the sample from which key ranges are taken
        qm = model.with_scheme(specs[scheme])
        for codec in qm.codecs or []:
            codec.widen(8.0)  # the ranges are those of a short sample
        cache = qm.new_cache("A")
        cache.graphs = False  # a graph's steps differ by the order of sums
        torch.manual_seed(2)
        ids = torch.randint(0, model.dims["vocab_size"], (2, 1032), device=zero)
        logits = []
        with torch.inference_mode():
            for part in ids.split([1024, *[1] * 8], 1):
                out = qm.model(input_ids=part, past_key_values=cache, logits_to_keep=1)
                logits.append(out.logits.float().cpu())
        found.append(torch.cat(logits, 1))
    assert found[0].isfinite().all() and found[0].std() > 0.1
    # 40 layers in fp16: torch may sum the scores of a step in another order
    assert (found[1] - found[0]).std() < 0.01 * found[0].std()
