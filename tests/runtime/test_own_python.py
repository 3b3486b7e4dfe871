"""Rules call the Python that runs Snakemake."""

import os
import sys
from pathlib import Path

import pytest

from kvquant.runtime.own_python import find_own_python


def test_the_folder_of_this_python_is_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", "/usr/bin")
    find_own_python()
    assert os.environ["PATH"] == f"{own}{os.pathsep}/usr/bin"
    monkeypatch.setenv("PATH", f"/stub{os.pathsep}{own}")  # a stand-in before it stays first
    find_own_python()
    assert os.environ["PATH"] == f"/stub{os.pathsep}{own}"
