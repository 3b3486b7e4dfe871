"""Whole jobs on a tiny model.

Also covers: benchmarks.job_side, study.jobs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from kvquant.benchmarks import job_side
from kvquant.benchmarks.job_side import JobSide, JobTimes
from kvquant.benchmarks.jobs import Runner, turns
from kvquant.benchmarks.random_model import RandomModel
from kvquant.cli import main
from kvquant.errors import OutlierOverflow, UserError
from kvquant.study.jobs import JobCase, JobsSpec
from kvquant.study.records import JobRecord, read_record
from kvquant.study.schemes import Fp16Scheme, Fp16StaticScheme, NuqScheme, Scheme
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
