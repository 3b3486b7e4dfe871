"""`kvquant manuscript`: compiles a LaTeX document of the paper into a PDF.

The document lies in the repository, and what it inputs (numbers, tables, figures) was made by the
workflow in another folder. LaTeX runs in a temporary folder, so that neither holds its by-products.
What a reader would stumble over ends it: an undefined reference or citation, an overfull line. A
number that is not measured stays as a mark on the page, and is counted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from kvquant.errors import UserError
from kvquant.formats.files import read_bytes, replace

PACKAGES = "latexmk texlive-latex-extra texlive-fonts-recommended cm-super-minimal"  # of Debian
MAX_OVERFULL = 3.0  # points by which a line may be too wide without anyone seeing it
TIMEOUT = 170  # seconds
EPOCH = "1767225600"  # the date in the PDF, so that one input gives one file


def _run(tex: Path, paper: Path, build: Path) -> str:
    """Compiles a document and returns the log of its last run.

    Raises:
        UserError: LaTeX is not installed, or found an error, which is named.
    """
    if missing := [name for name in ("latexmk", "pdflatex") if shutil.which(name) is None]:
        raise UserError(
            f"--tex: no {' and no '.join(missing)} on this machine: apt-get install {PACKAGES}"
        )
    # The last, empty entry stands for LaTeX's own folders.
    inputs = os.pathsep.join([str(paper.resolve()), str(tex.parent.resolve()), ""])
    env = {**os.environ, "TEXINPUTS": inputs, "BIBINPUTS": inputs, "BSTINPUTS": inputs}
    env |= {"SOURCE_DATE_EPOCH": EPOCH, "FORCE_SOURCE_DATE": "1", "max_print_line": "1000"}
    command = ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error"]
    try:
        done = subprocess.run(
            [*command, str(tex.resolve())],
            cwd=build,
            env=env,
            capture_output=True,
            check=False,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"--tex: {tex}: LaTeX did not end within {TIMEOUT} seconds") from None
    log = build / f"{tex.stem}.log"
    text = log.read_text(encoding="latin-1") if log.is_file() else ""
    if done.returncode:
        errors = re.findall(r"^! .*(?:\n(?!!).*){0,3}", text, re.M)
        told = errors[0] if errors else done.stdout.decode(errors="replace")[-600:]
        raise UserError(f"--tex: {tex}: LaTeX failed: {' '.join(told.split())}")
    return text


def faults(log: str) -> list[str]:
    """Returns what is wrong in a document that compiled: references, and lines too wide."""
    found = re.findall(r"LaTeX Warning: (Reference `.*?' .*? undefined)", log)
    found += re.findall(r"Warning: (Citation `.*?' .*? undefined)", log)
    found += re.findall(r"LaTeX Warning: (Label `.*?' multiply defined)", log)
    for width, rest in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt (too \w+.*)", log):
        if float(width) > MAX_OVERFULL:
            found.append(f"a line or page {width} pt {rest}")
    return list(dict.fromkeys(found))


def missing_numbers(log: str) -> list[str]:
    """Returns the warnings about numbers, tables and studies that are not there."""
    return list(dict.fromkeys(re.findall(r"Package kvquant Warning: (.*?) on input line", log)))


def run(args: argparse.Namespace) -> None:
    """Compiles the document.

    Raises:
        UserError: Names each fault of the document.
    """
    read_bytes(args.tex, "--tex")
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder)
        log = _run(args.tex, args.paper, build)
        if found := faults(log):
            raise UserError("\n".join(f"--tex: {args.tex}: {fault}" for fault in found))
        replace(args.out, (build / f"{args.tex.stem}.pdf").read_bytes())
    lacking = missing_numbers(log)
    for line in lacking:
        print(f"manuscript: {line}")
    pages = re.findall(r"Output written on .*? \((\d+) pages?", log)
    print(
        f"manuscript: {args.out}: {pages[-1] if pages else '?'} pages, {len(lacking)} not measured"
    )
