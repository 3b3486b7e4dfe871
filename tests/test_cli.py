"""The command line: help of every verb, at once, one-line errors, exit statuses.

Also covers: __main__, errors, analysis.options, analysis.explorer.options, benchmarks.options,
calibration.options, diagnosis.options, evaluation.options, fetch.options, playground.options,
study.options.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kvquant.cli import VERBS, main


@pytest.mark.parametrize("given", [None, "7"])
def test_threads_do_not_spin_for_long_unless_they_are_told_to(
    given: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(sys, "argv", ["kvquant", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("kvquant", run_name="__main__")
    assert stop.value.code == 0
    assert os.environ["GOMP_SPINCOUNT"] == (given or "5000")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


def test_help_imports_nothing_heavy(root: Path) -> None:
    """One process says the help of all verbs, so that whatever one of them imports is seen."""
    code = (
        "import sys\n"
        "from kvquant.cli import VERBS, main\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'rich', 'kvquant.study.config'}\n"
        "for words in (['--help'], *([verb, '--help'] for verb in VERBS)):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert stop.code == 0, words\n"
        "    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: kvquant") == 1 + len(VERBS)


def test_a_verb_says_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvquant.study.grid.run", lambda args: 1)
    assert main(["grid", "--study", "study.yaml"]) == 1
    monkeypatch.setattr("kvquant.study.grid.run", lambda args: None)
    assert main(["grid", "--study", "study.yaml"]) == 0


def test_unknown_verb_and_missing_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluat"]) == 2
    assert "did you mean evaluate" in capsys.readouterr().err
    assert main(["grid", "--study", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "kvquant: error: --study: no such file: nowhere.yaml\n"


def test_ctrl_c_ends_a_verb_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvquant.study.grid.run", interrupted)
    assert main(["grid", "--study", "study.yaml"]) == 130
    assert capsys.readouterr().err == "kvquant: interrupted\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["grid", "--study", ""], "--study"),
        (["grid", "--study="], "--study"),
        (["fetch-model", "--study", "s.yaml", "--model", "m", "--out", ""], "--out"),
        (["quantize", "--stats", "", "--out", "q.json"], "--stats"),
        ([""], "verb"),
    ],
)
def test_empty_values_are_named(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an unset variable of a shell leaves them."""
    assert main(words) == 2
    assert capsys.readouterr().err == f"kvquant: error: {named}: is empty\n"


def _status_of(words: list[str], stdout: int | None, root: Path) -> tuple[int, str]:
    """The exit status and the errors of a verb with a standard output of its own.

    The interpreter's buffering is the usual one, by which short output is written at the end.
    """
    usual = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "kvquant", *words]
    if stdout is None:
        command = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=root, env=usual, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["grid", "--study", "config/demo.yaml"],  # written by rich
        ["study", "--study", "config/demo.yaml"],  # written by print
        ["--help"],  # written by argparse
    ],
)
def test_a_reader_that_left_is_no_success(words: list[str], root: Path) -> None:
    """As `| head -1`, and quiet as other programs are."""
    read, write = os.pipe()
    os.close(read)
    try:
        assert _status_of(words, write, root) == (141, "")
    finally:
        os.close(write)


def test_output_that_cannot_be_written_is_an_error(root: Path) -> None:
    with Path("/dev/full").open("w") as full:
        told = "kvquant: error: standard output: No space left on device\n"
        assert _status_of(["--help"], full.fileno(), root) == (2, told)
    assert _status_of(["--help"], None, root) == (
        2,
        "kvquant: error: standard output: is closed; send it to a file or to /dev/null\n",
    )
