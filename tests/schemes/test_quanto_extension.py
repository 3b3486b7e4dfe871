"""Who compiles quanto's CUDA kernels, with a stand-in for quanto."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvquant.errors import UserError
from kvquant.schemes import quanto_extension


class Extension:
    """Compiles behind a lock file as quanto does."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.build_directory = str(folder)
        self.loads = 0
        self._error = error

    @property
    def lib(self) -> object:
        if (Path(self.build_directory) / "lock").exists():
            raise AssertionError("would wait for ever")
        if self._error is not None:
            raise self._error
        self.loads += 1
        return object()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def put(extension: Extension | None) -> None:
        for name in ("optimum", "optimum.quanto", "optimum.quanto.library"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module: Any = ModuleType("optimum.quanto.library.extensions")
        module.is_extension_available = lambda name: extension is not None and name == "quanto_cuda"
        module.get_extension = lambda name: extension
        monkeypatch.setitem(sys.modules, module.__name__, module)
        sys.modules["optimum.quanto.library"].extensions = module  # type: ignore[attr-defined]
        quanto_extension.build.cache_clear()

    monkeypatch.setattr(quanto_extension.tempfile, "gettempdir", lambda: str(tmp_path))
    yield put
    quanto_extension.build.cache_clear()


def test_a_killed_process_leaves_no_wait(install: Any, tmp_path: Path) -> None:
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "lock").touch()
    extension = Extension(folder)
    install(extension)
    quanto_extension.build()
    quanto_extension.build()
    assert extension.loads == 1 and not (folder / "lock").exists()


def test_nothing_to_compile(install: Any) -> None:
    install(None)
    quanto_extension.build()


def test_the_compilers_last_line_is_told(install: Any, tmp_path: Path) -> None:
    install(Extension(tmp_path / "build", RuntimeError("Ninja is required\nno ninja found")))
    with pytest.raises(UserError, match=r"hf-quanto.*nvcc and ninja \(no ninja found\)"):
        quanto_extension.build()
