"""A temporary copy of the repository, in which a test makes the additions that the docs describe.

A test adds a file, inserts a line at a marked place and runs Python, pytest or Snakemake in the
copy. The copy counts what was edited, so that a test can hold how few lines an addition takes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent

from tests.support.snakemakes import run_snakemake

FILES = ("Snakefile", "pyproject.toml", "README.md")
COPIED = ("kvquant", "config", "workflow", "tests", "docs", *FILES)


class RepositoryCopy:
    """A copy of the code, the studies, the workflow and the tests.

    Attributes:
        root: The copy's folder.
        edits: Lines added, by file.
    """

    def __init__(self, source: Path, target: Path, copied: tuple[str, ...] = COPIED) -> None:
        """Copies the repository.

        Args:
            source: Root of the repository.
            target: A folder that does not exist yet.
            copied: Files and folders to copy, relative to `source`.
        """
        self.root = target
        self.edits: Counter[str] = Counter()
        target.mkdir(parents=True)
        # Bytecode is copied, too: it is valid as long as its source has the same time and size.
        ignored = shutil.ignore_patterns(".snakemake", "images")
        for name in copied:
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name, ignore=ignored)
            else:
                shutil.copy2(source / name, target / name)

    def add_file(self, path: str, text: str) -> None:
        """Adds a file.

        Args:
            path: Relative to the root; nothing may be there yet.
            text: Its content, indented at will.
        """
        file = self.root / path
        assert not file.exists(), f"{path} exists; an addition must not replace it"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = dedent(text).lstrip("\n")
        file.write_text(content, encoding="utf-8")
        self.edits[path] += len(content.splitlines())

    def insert_after(self, path: str, marker: str, text: str) -> None:
        """Inserts lines behind the one line that contains a marker.

        Args:
            path: Relative to the root.
            marker: Text that stands in exactly one line of the file.
            text: The lines, indented at will relative to the marked line.
        """
        self._insert(path, marker, text, offset=1)

    def insert_before(self, path: str, marker: str, text: str) -> None:
        """Inserts lines in front of the one line that contains a marker (see `insert_after`)."""
        self._insert(path, marker, text, offset=0)

    def _insert(self, path: str, marker: str, text: str, *, offset: int) -> None:
        file = self.root / path
        lines = file.read_text(encoding="utf-8").splitlines()
        places = [number for number, line in enumerate(lines) if marker in line]
        assert len(places) == 1, f"{path}: {len(places)} lines contain '{marker}', not one"
        place = places[0]
        margin = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        added = [margin + line if line else "" for line in dedent(text).strip("\n").splitlines()]
        lines[place + offset : place + offset] = added
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.edits[path] += len(added)

    def python(self, *arguments: str, check: bool = True, timeout: float = 300) -> str:
        """Runs Python in the copy.

        Args:
            arguments: Such as `"-c", "..."` or `"-m", "kvquant", ...`.
            check: Whether a failure fails the test, with what was printed.
            timeout: In seconds.

        Returns:
            Standard output and standard error.
        """
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == 0 or not check, done.stdout[-6000:]
        return done.stdout

    def pytest(self, *arguments: str, check: bool = True, timeout: float = 600) -> str:
        """Runs the copy's tests in one process (see :meth:`python`)."""
        settings = ("-m", "pytest", "-n", "0", "-p", "no:cacheprovider")
        return self.python(*settings, *arguments, check=check, timeout=timeout)

    def snakemake(self, *arguments: str) -> str:
        """Runs Snakemake in the copy; gives standard output and standard error."""
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        done = run_snakemake(["--nolock", *arguments], self.root, environment)
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stdout + done.stderr
