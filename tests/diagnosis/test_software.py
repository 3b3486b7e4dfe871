"""Python, packages, programs, hub and data: each found, not found, or broken.

Also covers: diagnosis.checks.
"""

from __future__ import annotations

import importlib.metadata
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kvquant.diagnosis import software
from kvquant.diagnosis.checks import look
from kvquant.fetch.datasets import local_names
from kvquant.study.datasets import DATASETS
from tests.support.processes import free_port


@contextmanager
def hub(status: int) -> Iterator[str]:
    """A server of this machine that answers everything with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_check_that_raises_is_missing() -> None:
    def broken() -> software.Found:
        raise RuntimeError("no\nway")

    found = look("a", "b", broken, needed=True)
    assert (found.state, found.found, found.fails) == ("missing", "RuntimeError: no", True)


def test_this_machine_can_run_it() -> None:
    found = {check.name: check for check in software.software_checks()}
    assert {check.state for check in found.values()} == {"ok"}
    assert all(check.needed for check in found.values())


def test_a_source_tree_that_is_not_installed_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = software._required()

    def metadata(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    software._declared.cache_clear()
    assert software._required() == installed and software._python()[0] == "ok"
    software._declared.cache_clear()


def test_versions_out_of_range_are_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "rich":
            raise importlib.metadata.PackageNotFoundError(package)
        return "4.0.0" if package == "transformers" else real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {check.name: check for check in software.software_checks()}
    assert found["transformers"].fails and "4.0.0, outside" in found["transformers"].found
    assert found["transformers"].fix.startswith("pip install 'transformers")
    assert found["packages"].fails and "rich>=13.7 (found none)" in found["packages"].found


def test_the_hub_answers_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for status in (200, 401, 503):
        with hub(status) as url:
            monkeypatch.setenv("HF_ENDPOINT", url)
            assert software.hub_check(offline=False).state == "ok"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    found = software.hub_check(offline=False)
    assert found.state == "warning" and "not reachable" in found.found and "\n" not in found.found
    assert software.hub_check(offline=True).state == "skipped"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert software.hub_check(offline=False).state == "skipped"


def command(folder: Path, name: str, script: str) -> None:
    """Makes a command of a shell script."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_slurm_and_latex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = {check.name: check for check in software.optional_checks()}
    assert checks["Slurm"].state == checks["LaTeX"].state == "warning" and checks["LaTeX"].fix
    assert not any(check.fails for check in checks.values())
    command(tmp_path, "sinfo", 'test "$1" = --version && echo slurm 24.05 || echo gpu')
    assert software._slurm()[:2] == ("missing", "no sbatch, squeue, scancel")
    for name in ("sbatch", "squeue", "scancel", "latexmk", "pdflatex"):
        command(tmp_path, name, "exit 0")
    assert software._slurm() == ("ok", "slurm 24.05, partitions gpu", "")
    assert software._latex()[0] == "ok"
    monkeypatch.setattr(software, "COMMAND_SECONDS", 0.5)
    command(tmp_path, "sinfo", 'test "$1" = --version && echo slurm 24.05 || exec /bin/sleep 20')
    assert software._slurm()[0] == "warning"
    command(tmp_path, "sinfo", 'test "$1" = --version && echo slurm || { echo no >&2; exit 1; }')
    assert software._slurm()[1] == "slurm; no"
    command(tmp_path, "sinfo", "echo no configuration >&2; exit 1")
    assert software._slurm()[1] == "no configuration"


def test_data_sets_of_a_folder(tmp_path: Path) -> None:
    (nothing,) = software.data_checks(None)
    assert nothing.state == "skipped" and "KVQUANT_DATA_DIR" in nothing.fix
    (absent,) = software.data_checks(tmp_path / "nowhere")
    assert absent.state == "missing"
    names = [name for name in DATASETS if local_names(name)]
    for name in names:
        if name != "longbench-qasper":
            file = tmp_path / local_names(name)[-1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    found = {check.name: check for check in software.data_checks(tmp_path)}
    assert set(found) == {"data folder", "wikitext2", "squad", "hotpotqa", "longbench"}
    assert found["wikitext2"].state == found["squad"].state == "ok"
    assert found["longbench"].state == "warning"
    assert found["longbench"].found == "no longbench-qasper"


def test_the_data_sets_here(data_dir: Path) -> None:
    found = {check.name: check.state for check in software.data_checks(data_dir)}
    assert found["wikitext2"] == "ok"
