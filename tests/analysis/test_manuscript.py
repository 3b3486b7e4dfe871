"""Compiling a document of the paper, and what ends it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from kvquant.analysis import manuscript
from kvquant.errors import UserError

LOG = r"""
LaTeX Warning: Reference `fig:none' on page 3 undefined on input line 5.
Package natbib Warning: Citation `nobody2020' on page 1 undefined on input line 7.
LaTeX Warning: Label `a' multiply defined.
Overfull \hbox (2.1pt too wide) in paragraph at lines 1--2
Overfull \hbox (31.5pt too wide) in paragraph at lines 8--9
Package kvquant Warning: number `a.bits' of study `' is not measured on input line 4.
Package kvquant Warning: number `a.bits' of study `' is not measured on input line 9.
"""


def test_faults_of_a_document_that_compiled() -> None:
    assert manuscript.faults(LOG) == [
        "Reference `fig:none' on page 3 undefined",
        "Citation `nobody2020' on page 1 undefined",
        "Label `a' multiply defined",
        "a line or page 31.5 pt too wide) in paragraph at lines 8--9",
    ]
    assert manuscript.faults("Output written on main.pdf (3 pages, 100 bytes).") == []


def test_what_is_not_measured_is_named_once() -> None:
    assert manuscript.missing_numbers(LOG) == ["number `a.bits' of study `' is not measured"]


def compiled(root: Path, folder: Path, body: str) -> Path:
    """The PDF of a document with the numbers of a folder."""
    if shutil.which("latexmk") is None or shutil.which("pdflatex") is None:
        pytest.skip("LaTeX is not installed")
    for name in ("kvquant.sty", "twocolumns.sty"):
        shutil.copy(root / "paper" / name, folder)
    tex, out = folder / "text.tex", folder / "made/text.pdf"
    head = "\\documentclass{article}\\usepackage{kvquant}\\kvnumbers{numbers}\n\\begin{document}"
    tex.write_text(f"{head}\n{body}\n\\end{{document}}\n")
    manuscript.run(argparse.Namespace(tex=tex, paper=folder / "paper", out=out))
    return out


@pytest.mark.fault(
    "statistics", "a number that the paper shows is not measured", "a mark in its place, counted"
)
def test_numbers_come_from_the_folder_and_a_missing_one_leaves_a_mark(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/numbers.tex").write_text("\\kvnumber{a.bits}{3.40}% 2 records\n")
    out = compiled(root, tmp_path, r"Bits: \kv{a.bits}, \kv{b.bits}, \kv[other]{a.bits}.")
    told = capsys.readouterr().out
    assert "number `b.bits' of study `' is not measured" in told
    assert "number `a.bits' of study `other' is not measured" in told
    assert "1 pages, 2 not measured" in told
    first = out.read_bytes()
    assert compiled(root, tmp_path, r"Bits: \kv{a.bits}, \kv{b.bits}, \kv[other]{a.bits}.")
    assert out.read_bytes() == first  # the same input gives the same file
    assert sorted(f.name for f in out.parent.iterdir()) == ["text.pdf"]


def test_an_undefined_reference_ends_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text\.tex: Reference `none' .* undefined"):
        compiled(root, tmp_path, r"See \ref{none}.")
    assert not (tmp_path / "made/text.pdf").exists()


def test_an_error_of_latex_is_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LaTeX failed: ! Undefined control sequence.*nothere"):
        compiled(root, tmp_path, r"\nothere")


def test_without_latex_the_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tex").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    args = argparse.Namespace(tex=tmp_path / "a.tex", paper=tmp_path, out=tmp_path / "a.pdf")
    with pytest.raises(UserError, match="no latexmk and no pdflatex on this machine: apt-get"):
        manuscript.run(args)
