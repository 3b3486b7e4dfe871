"""Reads Markdown pages as a forge shows them: links, anchors, code blocks and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^(?P<fence>```+)(?P<language>[\w-]*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=fence)$",
    re.S | re.M,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:^|[\s(])kvquant +(?P<words>[a-z][^\n]*)", re.M)
SHELL_ENDS = {"|", "||", "&&", "&", ";", ">", ">>", "2>"}


def markdown_pages(root: Path) -> list[Path]:
    """Every page that people read: those of docs/, and all others that are part of the site."""
    folders = (".", "docs", "config", "envs", "results", "results/published")
    return sorted(page for folder in folders for page in (root / folder).glob("*.md"))


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    code: str
    line: int
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(f["language"], f["code"], text.count("\n", 0, f.start("code")) + 1, f["reason"])
        for f in FENCE.finditer(text)
    ]


def without_code(text: str) -> str:
    """A page's text, in which nothing but text can be a heading or a link."""
    text = FENCE.sub("", re.sub(r"<!-- not run.*?-->\n", "", text))
    return re.sub(r"^ {4,}\S.*$", "", text, flags=re.M)


def links(page: Path) -> list[str]:
    """The targets of a page's links and images."""
    text = INLINE.sub("code", without_code(page.read_text(encoding="utf-8")))
    return LINK.findall(text)


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", without_code(page.read_text(encoding="utf-8")), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        number = 0
        while (numbered := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(numbered)
    return found


@dataclass(frozen=True)
class Command:
    """A command `kvquant VERB ...` on a page, without `kvquant`."""

    words: tuple[str, ...]
    whole: bool  # as opposed to one that a sentence mentions


def _words(line: str) -> tuple[str, ...]:
    """The words of a command, up to the next one on its line."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in SHELL_ENDS:
            break
        words.append(word.rstrip(";"))
    return tuple(words)


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page: lines of code, and those in its sentences."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join(b.code for b in blocks(page) if b.language not in ("python", "yaml"))
    rest = FENCE.sub("", text)
    code += "\n".join(re.findall(r"^ {4}.*$", rest, re.M))
    for found in COMMAND.finditer(code.replace("\\\n", " ")):
        yield Command(_words(found["words"]), whole=True)
    for span in INLINE.findall(rest):
        for found in COMMAND.finditer(" ".join(span.split())):
            yield Command(_words(found["words"]), whole=False)
