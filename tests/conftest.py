"""Shared fixtures; what tests call is in `tests.support`."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from tests.support.triton_interpreter import quicken

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    quicken()
# Tests start hundreds of Python processes. Where an environment forbids bytecode files, each of
# them would compile snakemake, torch and transformers again, which takes longer than the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Workers and the processes that tests start share the cores already.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
FORKING = {"test_faults.py"}
torch.set_num_threads(1)


def weight(item: pytest.Item) -> int:
    """How long a test may take, in the usual time of one."""
    return 60 if item.get_closest_marker("slow") else 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="also what the markers `thinned` and `exhaustive` leave out; CI runs all",
    )


def left_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests that a run without --all-combinations leaves out.

    Of a test's combinations marked as thinned every n-th stays: n has no factor in common with the
    numbers of values, so that each value stays with others.
    """
    seen: dict[tuple[Path, str], int] = {}
    found = []
    for item in items:
        thinned = item.get_closest_marker("thinned")
        name = (item.path, getattr(item, "originalname", item.name))
        index = seen[name] = seen.get(name, -1) + 1
        if item.get_closest_marker("exhaustive") or (thinned and index % thinned.args[0]):
            found.append(item)
    return found


@pytest.fixture
def all_combinations(request: pytest.FixtureRequest) -> bool:
    """Whether a test that tries many places may try all."""
    return bool(request.config.getoption("--all-combinations"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that fork come first, then those that take longest, so that workers end together.

    A forked process cannot compute gradients once its parent has. Most tests take about as long,
    and those that are marked as slow as long as many of them.
    """
    if not config.getoption("--all-combinations") and (gone := left_out(items)):
        config.hook.pytest_deselected(items=gone)
        without = set(gone)
        items[:] = [item for item in items if item not in without]
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    weights = {file: sum(map(weight, found)) for file, found in by_file.items()}
    ordered = sorted(by_file, key=lambda file: (file.name not in FORKING, -weights[file]))
    items[:] = [item for file in ordered for item in by_file[file]]


def pytest_collection_finish() -> None:
    """What was imported is not garbage.

    Without this, each of the library's collections, which it runs between batches, looks through
    the million objects of torch and transformers again, for a third of a second.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Lets the interpreter clear up at its end; Triton's modules tell of leaks otherwise."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _own_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kernels are compiled anew, not taken from the user's cache."""
    os.environ["KVQUANT_CACHE"] = str(tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Evaluation data that is not part of the repository."""
    found = os.environ.get("KVQUANT_DATA_DIR")
    if not found or not Path(found).is_dir():
        pytest.skip("KVQUANT_DATA_DIR is not set to a folder of evaluation data")
    return Path(found)
