"""Whole jobs of a model whose kv heads processes share, on the CPU.

Also covers: benchmarks.random_shards, benchmarks.team.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.benchmarks import jobs, shared_jobs
from kvquant.benchmarks.job_runner import Runner
from kvquant.benchmarks.job_side import JobSide, JobTimes
from kvquant.benchmarks.random_model import RandomModel
from kvquant.benchmarks.shared_jobs import run_processes
from kvquant.benchmarks.team import ProcessTeam, Team
from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.models.tensor_parallel import own_tensor
from kvquant.study.jobs import JobCase, JobsSpec
from kvquant.study.records import JobRecord, read_record
from kvquant.study.schemes import AllocatedScheme, Fp16Scheme, NuqScheme
from tests.support.processes import in_processes
from tests.support.studies import study_of

SHAPE = "tiny-gqa"
CPU = torch.device("cpu")
SCHEMES: dict[str, Any] = {
    "fp16": Fp16Scheme(kind="fp16"),
    "nuq3": NuqScheme(kind="nuq", bits=3, outliers=0.01),
    "allocated": AllocatedScheme(kind="allocated", bits=3.4),
}
CASE: dict[str, Any] = {
    "shape": SHAPE, "prompt": 160, "answer": 4, "batch_size": 2, "trials": 1, "energy": True,
    "schemes": ["fp16", "fp16-static", "nuq3", "allocated"],
}  # fmt: skip
BY_HEADS = CASE | {"gpus": 2, "split": "heads"}


def logits_of(model: RandomModel, scheme: str) -> torch.Tensor:
    """Logits of a prompt and two steps over a scheme's cache."""
    qm = model.with_scheme(SCHEMES[scheme])
    for codec in qm.codecs or []:
        codec.widen(8.0)  # the ranges are those of a short sample
    cache = qm.new_cache("A")
    ids = torch.randint(0, 4000, (2, 162), generator=torch.Generator().manual_seed(5))
    found = []
    with torch.inference_mode():
        for part in ids.split([160, 1, 1], 1):
            out = qm.model(input_ids=part, past_key_values=cache, logits_to_keep=1)
            found.append(out.logits)
    return torch.cat(found, 1)


def part_of_model() -> dict[str, Any]:
    """What one of two processes finds of its part of a model."""
    model = RandomModel(SHAPE, CPU, split="heads")
    assert model.share is not None
    named = dict(model.model.named_parameters())
    alone = model.part_alone()
    of_alone = dict(alone.model.named_parameters())
    found: dict[str, Any] = {
        "weights": {
            n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in named.items()
        },
        "same memory": all(
            own_tensor(p).data_ptr() == of_alone[n].data_ptr() for n, p in named.items()
        ),
        "bytes": (model.weight_bytes, model.bytes_on(CPU), alone.weight_bytes),
        "heads": (model.own_kv_heads, alone.own_kv_heads),
    }
    for name, scheme in SCHEMES.items():
        found[name] = logits_of(model, name)
        case = JobCase(**BY_HEADS | {"schemes": ["fp16"]})
        caches = [
            JobSide(name, one.with_scheme(scheme), case, graphs=False).prefill_one(0, 160)[0]
            for one in (model, alone)
        ]
        found[f"caches of {name}"] = [(cache_nbytes(c), cache_elements(c)) for c in caches]
        found[f"fit of {name}"] = model.tokens_that_fit(scheme, 16384, {CPU: 10**9})
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return in_processes(2, tmp_path_factory.mktemp("parts") / "two", part_of_model)


def test_parts_are_those_of_one_model(parts: list[dict[str, Any]]) -> None:
    """A model with the weights of all parts gives the logits that the processes give together."""
    one = RandomModel(SHAPE, CPU)
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            weight = parts[0]["weights"][name]
            assert torch.equal(weight, parts[1]["weights"][name])
            assert weight.shape == parameter.shape
            parameter.copy_(weight)
    embedding = parts[0]["weights"]["model.embed_tokens.weight"]
    assert embedding.std() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(*embedding.chunk(2))  # each process draws its own
    for name in SCHEMES:
        torch.manual_seed(0)  # the sample from which key ranges are taken
        one._keys = None
        whole = logits_of(one, name)
        for part in parts:
            assert torch.equal(part[name], parts[0][name])
            # Rounding may move single numbers to the next code.
            assert float((part[name] - whole).abs().mean()) < 1e-3 * float(whole.std()), name


def test_a_part_alone_takes_the_memory_of_the_part(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        assert part["same memory"]
        assert len(set(part["bytes"])) == 1
        assert part["heads"] == (4, 4)
        for name in SCHEMES:
            (shared, elements), (alone, same) = part[f"caches of {name}"]
            assert elements == same == 2 * 2 * 160 * 4 * 32  # keys, values; layers, heads
            assert alone == pytest.approx(shared, rel=0.05)  # outliers are of its own heads
    whole = RandomModel(SHAPE, CPU)
    # Older releases of transformers keep the whole embedding in each process.
    embedding = int(whole.model.model.embed_tokens.weight.nbytes)
    total = sum(part["bytes"][0] for part in parts)
    assert any(
        total == pytest.approx(whole.weight_bytes + more, rel=0.001) for more in (0, embedding)
    )
    free = [10**9 - part["bytes"][0] for part in parts]
    for room, part in zip(free, parts, strict=True):
        per_token = 2 * 2 * 4 * 32 * 2  # keys and values of two layers and four heads in 16 bits
        assert part["fit of fp16"] == room // per_token
        assert part["fit of allocated"] > 3 * part["fit of fp16"]


@pytest.fixture()
def no_carbon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves CodeCarbon's slow start out."""

    def fails(self: Any) -> Any:
        raise ImportError("not installed")

    monkeypatch.setattr("kvquant.energy.carbon.CarbonTracker._open", fails)


def run(folder: Path, case: dict[str, Any]) -> tuple[int, Path]:
    """Runs a case as the workflow does."""
    schemes = {name: spec.model_dump(mode="json") for name, spec in SCHEMES.items()}
    schemes["fp16-static"] = {"kind": "fp16-static"}
    asked = {"cases": {"tiny": case}, "seconds": 0.05, "idle_seconds": 0.1}
    folder.mkdir(exist_ok=True)
    file = folder / "study.json"
    file.write_text(study_of(schemes=schemes, jobs=asked).model_dump_json())
    words = ["bench", "jobs", "--study", str(file), "--device-name", "cpu", "--device", "cpu"]
    return main([*words, "--out-dir", str(folder)]), folder / "tiny.json"


def test_a_case_by_heads_is_a_record_as_by_layers(
    tmp_path: Path, no_carbon: None, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out = run(tmp_path / "heads", BY_HEADS)
    assert code == 0
    lines = capfd.readouterr().err.splitlines()
    assert sum("trial 1" in line for line in lines) == len(CASE["schemes"])  # one process tells
    assert run(tmp_path / "layers", CASE)[0] == 0
    shared, whole = (
        read_record(tmp_path / f"{n}/tiny.json", JobRecord) for n in ("heads", "layers")
    )
    assert (shared.gpus, shared.split, whole.gpus, whole.split) == (2, "heads", 1, "layers")
    assert shared.weight_bytes == shared.memory_bytes >= whole.weight_bytes
    assert out.with_suffix(".csv").exists()
    if "no counter" in shared.method:  # otherwise the processor's own counter has all of them
        assert "2 processes" in shared.method and "processes" not in whole.method
    for ours, theirs in zip(shared.sides, whole.sides, strict=True):
        there, others = (side.model_dump(exclude_none=True) for side in (ours, theirs))
        assert there.keys() == others.keys()
        for name in ("scheme", "status", "batch_size", "cache_elements"):
            assert there[name] == others[name]
        assert ours.bits_per_element is not None and theirs.bits_per_element is not None
        assert ours.bits_per_element == pytest.approx(theirs.bits_per_element, rel=0.1)
        assert ours.decoder == "from Python" and len(ours.trials) == 1


def test_a_study_that_changes_while_it_runs_changes_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two processes would run what is recorded as a case of four."""

    def after_a_change(*args: Any) -> None:
        file = tmp_path / "study.json"
        file.write_text(file.read_text().replace('"gpus":2', '"gpus":4'))
        run_processes(*args)

    monkeypatch.setattr(jobs, "run_processes", after_a_change)
    code, out = run(tmp_path, BY_HEADS | {"energy": False, "schemes": ["fp16"]})
    assert code == 0
    assert '"gpus":4' in (tmp_path / "study.json").read_text()
    assert read_record(out, JobRecord).gpus == 2


def test_processes_that_cannot_share_are_one_line(tmp_path: Path) -> None:
    for case, words in (
        (
            BY_HEADS | {"gpus": 3},
            r"gpus: 3 cannot share the 8 kv heads of 'tiny-gqa'.* give 2 or 4 or 8",
        ),
        (CASE | {"split": "heads"}, "gpus: 1 cannot share the 8 kv heads"),
        (BY_HEADS | {"shape": "tiny"}, r"1 kv heads of 'tiny' evenly .*give another shape"),
        (BY_HEADS | {"shape": "70b-gqa", "gpus": 16}, "give 2 or 4 or 8"),
    ):
        with pytest.raises(UserError, match=words):
            study_of(jobs={"cases": {"tiny": case | {"schemes": ["fp16"]}}})
    schemes = {"fp16": {"kind": "fp16"}, "ref": {"kind": "kvquant-ref", "bits": 3}}
    with pytest.raises(
        UserError, match=r"schemes: 'ref' is of kind 'kvquant-ref', which codes the"
    ):
        study_of(
            schemes=schemes | {"nuq3": {"kind": "nuq", "bits": 3}},
            jobs={"cases": {"tiny": BY_HEADS | {"schemes": ["fp16", "ref"]}}},
        )


def failing(device: torch.device, team: Team, how: str) -> None:
    """The second of two processes fails, and the first waits for it."""
    team.wait()
    if team.rank == 1 and how == "refuses":
        raise UserError("batch_size: is too large")
    if team.rank == 1 and how == "fails":
        raise ValueError("unforeseen\nin two lines")
    if team.rank == 1 and how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    team.wait()


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("refuses", "jobs.cases.tiny: batch_size: is too large"),
        ("fails", "jobs.cases.tiny: process 1 of 2 failed: ValueError: unforeseen"),
        ("is killed", "jobs.cases.tiny: process 1 of 2 was ended by SIGKILL"),
    ],
)
def test_the_process_that_failed_is_told_and_the_others_end(how: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        run_processes(failing, (how,), [CPU, CPU], "tiny")
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_stopped_run_ends_its_processes(
    number: signal.Signals, error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error):
        run_processes(stopping, (number, tmp_path), [CPU, CPU], "tiny")
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def stopping(device: torch.device, team: Team, number: int, folder: Path) -> None:
    """The first process stops the one that started it, and both would run on."""
    (folder / str(team.rank)).write_text(str(os.getpid()))
    team.wait()
    if team.first:
        os.kill(os.getppid(), number)
    signal.pause()


def asked() -> list[Any]:
    """What processes of a team tell each other."""
    torch.distributed.init_process_group("gloo")
    team = ProcessTeam()
    team.wait()
    rank = team.rank
    return [
        team.gathered(rank),
        team.told(f"of {rank}"),
        team.least(5 - rank),
        team.most(0.5 * rank),
    ]


def test_all_processes_decide_alike(tmp_path: Path) -> None:
    assert in_processes(2, tmp_path / "two", asked) == [[[0, 1], "of 0", 4, 0.5]] * 2
    team = Team()
    assert (team.gathered(7), team.told(7), team.least(7), team.most(7.0)) == ([7], 7, 7, 7.0)


class Smaller(Team):
    """A team whose second process has memory for less, and is slower."""

    size = 2

    def gathered(self, value: Any) -> list[Any]:
        """Adds what the second process says."""
        if isinstance(value, bool):
            return [value, not value]
        return [value, value - 1 if isinstance(value, int) else value + 100.0]


class Part(JobSide):
    """A side whose memory is full with four prompts."""

    tried: list[int]

    def job(self, batch: int, *args: Any) -> JobTimes:
        """Keeps what was tried."""
        self.tried.append(batch)
        if batch > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().job(batch, *args)

    def tokens_that_fit(self) -> tuple[int, int]:
        """Six prompts fit without their answers."""
        return 6, 6 * self.case.prompt + 7


def test_what_fits_is_what_fits_in_every_process() -> None:
    """It is searched by each alone; together they run only what all have room for."""
    model = RandomModel("tiny", CPU)
    case = JobCase(shape="tiny", prompt=40, answer=2, schemes=["fp16"])
    qm = model.with_scheme(SCHEMES["fp16"])
    together, alone = Part("fp16", qm, case), Part("fp16", qm, case)
    together.tried, alone.tried = [], []
    spec = JobsSpec(cases={"tiny": case})
    runner = Runner(together, spec, None, Smaller(), alone)
    runner.prepare()
    assert alone.tried == [5, 4]  # the second process has room for five
    assert together.tried == [runner.batch] == [3]
    assert runner.capacity == 6 * 40 + 6
    assert runner.slow  # as the second process was
    runner.batch = 5
    with pytest.raises(UserError, match="process 0 of 2 is out of memory with 5 prompts"):
        runner.fits()


def test_processes_see_the_gpus_that_were_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", index) for index in (1, 3)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shared_jobs._seen_by_processes(gpus) == "1,3"
    assert shared_jobs._seen_by_processes([CPU, CPU]) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, GPU-b, 5, 4")
    assert shared_jobs._seen_by_processes(gpus) == "GPU-b,4"
