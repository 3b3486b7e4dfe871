"""Processes spread over GPUs: the fewest first, counted right when they die, timed ones alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.runtime import devices

NAMES = ["gpu-a", "gpu-b", "gpu-c"]
HOLDER = """
import sys
from pathlib import Path
from kvquant.runtime import devices
if sys.argv[2] == "alone":
    devices.claim_alone(sys.argv[3:], folder=Path(sys.argv[1]))
    print("alone", flush=True)
else:
    count = int(sys.argv[2])
    found = devices.claim_shared(sys.argv[3:], count, Path(sys.argv[1]))
    print(*found, flush=True)
sys.stdin.read()
"""


@contextmanager
def holders(
    root: Path, folder: Path, count: int, names: list[str], how: str = "1"
) -> Iterator[tuple[list[subprocess.Popen[str]], list[str]]]:
    """Processes started together, and what each printed; killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(folder), how, *names]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    try:
        yield started, [p.stdout.readline().strip() for p in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture(autouse=True)
def _nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    held: dict[Path, object] = {}
    monkeypatch.setattr(devices, "_held", held)
    yield
    for handle in held.values():
        handle.close()  # type: ignore[attr-defined]


def test_processes_started_together_spread_evenly(tmp_path: Path, root: Path) -> None:
    with holders(root, tmp_path, 6, NAMES) as (_, found):
        assert Counter(found) == {"0": 2, "1": 2, "2": 2}


def test_a_node_of_eight_gpus_is_filled_evenly(tmp_path: Path, root: Path) -> None:
    """By 64 places each process takes the emptiest GPU, and one that ends gives its place back."""
    node = [f"gpu-{index}" for index in range(8)]
    with holders(root, tmp_path, 16, node) as (processes, found):
        assert Counter(found) == {str(index): 2 for index in range(8)}
        with pytest.raises(UserError, match="16 other process"):  # of the whole node
            devices.claim_alone(node, 8, folder=tmp_path)
        ended = processes[found.index("5")]
        ended.kill()
        ended.wait()
        assert devices.claim_shared(node, folder=tmp_path) == [5]
    with holders(root, tmp_path, 1, node, "8") as (_, said):  # a model over all of them
        assert said == ["0 1 2 3 4 5 6 7"]


def test_gpus_are_known_by_name(tmp_path: Path, root: Path) -> None:
    """Another numbering, or fewer of them, changes no count."""
    with holders(root, tmp_path, 1, NAMES[2:]):
        assert devices.claim_shared(NAMES[2:], folder=tmp_path) == [0]
        assert devices.claim_shared([NAMES[2], NAMES[0]], folder=tmp_path) == [1]


def test_the_place_of_a_killed_process_is_free(tmp_path: Path, root: Path) -> None:
    with holders(root, tmp_path, 3, NAMES) as (processes, found):
        assert sorted(found) == ["0", "1", "2"]
        middle = processes[found.index("1")]
        middle.kill()  # SIGKILL: no clean-up by the holder
        middle.wait()
        assert devices.claim_shared(NAMES, folder=tmp_path) == [1]
    files = [file.name.split(".")[0] for file in tmp_path.iterdir()]
    assert Counter(files) == {
        "gpu-a": 1,
        "gpu-b": 1,
        "gpu-c": 1,
        "lock": 1,
    }  # the dead one's is gone


def test_a_timed_job_is_alone(tmp_path: Path, root: Path) -> None:
    with holders(root, tmp_path, 1, NAMES[:1]):
        with pytest.raises(UserError, match=r"1 other process.* timing needs it alone"):
            devices.claim_alone(NAMES[:1], folder=tmp_path)
        devices.claim_alone(NAMES[1:2], folder=tmp_path)
        devices.claim_alone(NAMES[1:2], folder=tmp_path)  # its own lock is not in its way
    devices.claim_alone(NAMES[:1], folder=tmp_path)


def test_evaluations_avoid_a_gpu_that_is_timed(tmp_path: Path, root: Path) -> None:
    with holders(root, tmp_path, 1, NAMES[:1], "alone") as (_, said):
        assert said == ["alone"]
        assert [devices.claim_shared(NAMES[:2], folder=tmp_path) for _ in range(3)] == [[1]] * 3
        with pytest.raises(UserError, match="alone"):
            devices.claim_alone(NAMES[:1], folder=tmp_path)


def test_without_locks_the_process_number_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for process, expected in ((7, 1), (9, 0)):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        assert devices.claim_shared(NAMES, folder=tmp_path / "file/below") == [expected]
    devices.claim_alone(NAMES[:1], folder=tmp_path / "file/below")


@contextmanager
def used_by_another(folder: Path, name: str, suffix: str = ".shared") -> Iterator[None]:
    """A GPU that another process uses."""
    before = set(devices._held)
    devices._hold(folder, name, suffix)
    (file,) = set(devices._held) - before
    handle = devices._held.pop(file)
    try:
        yield
    finally:
        handle.close()


def claimed(folder: Path, suffix: str) -> list[str]:
    """The GPUs that have a lock, once per lock."""
    return sorted(file.name.split(".")[0] for file in folder.glob(f"*{suffix}"))


@pytest.fixture()
def current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three GPUs of one kind; which of them became torch's current one."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(devices, "visible_devices", lambda: NAMES)
    monkeypatch.setattr(devices, "device_name", lambda device: "h100-80gb-hbm3")
    monkeypatch.setattr(devices, "_folder", lambda: tmp_path)
    return found


def test_claim_sets_the_current_device(
    current: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with used_by_another(tmp_path, NAMES[0]):
        assert devices.claim("auto") == ["cuda:1"]
    assert devices.claim("cuda:2") == ["cuda:2"] and devices.claim("cpu") == ["cpu"]
    assert current == [1, 2]
    assert devices.claim("cuda:9") == ["cuda:9"]  # what resolves the name refuses it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.claim("auto", 2) == ["auto"]
    assert current == [1, 2]


def test_a_model_over_several_gpus_takes_the_least_used(
    current: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with used_by_another(tmp_path, NAMES[1]):
        assert devices.claim("cuda", 2) == ["cuda:0", "cuda:2"]
        assert current == [0]
        assert claimed(tmp_path, ".shared") == ["gpu-a", "gpu-b", "gpu-c"]
    assert "on GPUs 0, 2 of 3" in capsys.readouterr().err


def test_processes_that_take_two_gpus_each_spread_evenly(tmp_path: Path, root: Path) -> None:
    with holders(root, tmp_path, 3, NAMES, "2") as (_, found):
        assert Counter(" ".join(found).split()) == {"0": 2, "1": 2, "2": 2}


@pytest.mark.parametrize("claim", [devices.claim, devices.claim_timed])
def test_a_named_device_stays_one(claim: Any, current: list[int], tmp_path: Path) -> None:
    assert claim("cuda:1", 2, "models.large.gpus") == ["cuda:1"]
    assert current == [1]
    assert claimed(tmp_path, "") == ["gpu-b", "lock"]


@pytest.mark.fault(
    "devices",
    "a model over more GPUs than are visible",
    "one line that names the field; a named device stays one",
)
@pytest.mark.parametrize("claim", [devices.claim, devices.claim_timed])
def test_fewer_gpus_than_asked_for(claim: Any, current: list[int], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^models\.large\.gpus: 4 GPUs are asked for, but 3 .*can be seen; ask for"
    ):
        claim("auto", 4, "models.large.gpus")
    assert not claimed(tmp_path, "") and not current


def test_a_timed_job_takes_gpus_that_nobody_uses(current: list[int], tmp_path: Path) -> None:
    with used_by_another(tmp_path, NAMES[0]):
        with pytest.raises(UserError, match=r"1 other process.* use 3 of these 3 GPUs"):
            devices.claim_timed("cuda", 3)
        assert not claimed(tmp_path, ".alone")  # all of them or none
        assert devices.claim_timed("cuda", 2) == ["cuda:1", "cuda:2"]
    assert current == [1] and claimed(tmp_path, ".alone") == ["gpu-b", "gpu-c"]


def test_timed_jobs_at_once_have_gpus_of_their_own(current: list[int], tmp_path: Path) -> None:
    with used_by_another(tmp_path, NAMES[0], ".alone"):
        assert devices.claim_timed("auto") == ["cuda:1"]


def test_a_timed_job_stays_on_gpus_of_the_first_ones_name(
    current: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["a100", "h100", "a100"]
    monkeypatch.setattr(devices, "device_name", lambda device: kinds[device.index])
    with used_by_another(tmp_path, NAMES[0]):
        assert devices.claim_timed("auto") == ["cuda:2"]
    with pytest.raises(UserError, match=r"^gpus: 3 GPUs .* but 2 of the name a100 can be seen"):
        devices.claim_timed("auto", 3)
    assert devices.claim_timed("auto", 2) == ["cuda:0", "cuda:2"]


def test_without_locks_the_process_number_chooses_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("os.getpid", lambda: 5)
    assert devices.claim_shared(NAMES, 2, tmp_path / "file/below") == [0, 2]
    assert devices.claim_alone(NAMES, 2, tmp_path / "file/below") == [0, 1]


def test_a_process_that_starts_others_takes_no_memory_of_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: list[int]
) -> None:
    """CUDA would take some on the current device."""
    monkeypatch.setattr(devices, "_folder", lambda: tmp_path)
    found = devices.claim_timed("cuda", 2, current=False)
    assert found == ["cuda:0", "cuda:1"] and current == []
    assert claimed(tmp_path, ".alone") == ["gpu-a", "gpu-b"]
