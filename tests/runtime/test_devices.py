"""Processes spread over GPUs: the fewest first, counted right when they die, timed ones alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    devices.claim_alone(sys.argv[3], Path(sys.argv[1]))
    print("alone", flush=True)
else:
    print(devices.claim_shared(sys.argv[3:], Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@contextmanager
def holders(
    root: Path, folder: Path, count: int, names: list[str], how: str = "share"
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


def test_gpus_are_known_by_name(tmp_path: Path, root: Path) -> None:
    """Another numbering, or fewer of them, changes no count."""
    with holders(root, tmp_path, 1, NAMES[2:]):
        assert devices.claim_shared(NAMES[2:], tmp_path) == 0
        assert devices.claim_shared([NAMES[2], NAMES[0]], tmp_path) == 1


def test_the_place_of_a_killed_process_is_free(tmp_path: Path, root: Path) -> None:
    with holders(root, tmp_path, 3, NAMES) as (processes, found):
        assert sorted(found) == ["0", "1", "2"]
        middle = processes[found.index("1")]
        middle.kill()  # SIGKILL: no clean-up by the holder
        middle.wait()
        assert devices.claim_shared(NAMES, tmp_path) == 1
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
            devices.claim_alone(NAMES[0], tmp_path)
        devices.claim_alone(NAMES[1], tmp_path)
        devices.claim_alone(NAMES[1], tmp_path)  # its own lock is not in its way
    devices.claim_alone(NAMES[0], tmp_path)


def test_evaluations_avoid_a_gpu_that_is_timed(tmp_path: Path, root: Path) -> None:
    with holders(root, tmp_path, 1, NAMES[:1], "alone") as (_, said):
        assert said == ["alone"]
        assert [devices.claim_shared(NAMES[:2], tmp_path) for _ in range(3)] == [1, 1, 1]
        with pytest.raises(UserError, match="alone"):
            devices.claim_alone(NAMES[0], tmp_path)


def test_without_locks_the_process_number_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for process, expected in ((7, 1), (9, 0)):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        assert devices.claim_shared(NAMES, tmp_path / "file/below") == expected
    devices.claim_alone(NAMES[0], tmp_path / "file/below")


def test_claim_sets_the_current_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(devices, "visible_devices", lambda: NAMES)
    monkeypatch.setattr(devices, "_folder", lambda: tmp_path)
    devices._hold(tmp_path, NAMES[0], ".shared")
    held, devices._held = devices._held, {}  # as if another process held it
    try:
        assert devices.claim("auto") == "cuda:1"
        assert current == [1]
        assert devices.claim("cuda:2") == "cuda:2" and devices.claim("cpu") == "cpu"
        assert current == [1]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert devices.claim("auto") == "auto"
    finally:
        devices._held.update(held)
