"""The article's text: no typed number, and complete references."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvquant.analysis.table_list import TABLES


@pytest.fixture(scope="module")
def source(root: Path) -> str:
    text = (root / "paper/main.tex").read_text(encoding="utf-8")
    return re.sub(r"(?<!\\)%.*", "", text)


def body(source: str) -> str:
    return source[source.index(r"\begin{document}") : source.index(r"\bibliography{")]


def plain(source: str) -> str:
    """The prose: without mathematics, arguments that are no text, and marked numbers."""
    text = re.sub(r"\$[^$]*\$", " ", body(source))
    text = re.sub(r"\\fixed\{[^{}]*\}", " ", text)
    text = re.sub(r"\\(kv|kvif|loss|ci)(\[[^]]*\])?\{[^{}]*\}", " ", text)
    arguments = r"\\(cite[tp]?|ref|label|task|input|jobrow\{[^{}]*\}|mainrow\{[^{}]*\}\{[^{}]*\})"
    text = re.sub(arguments + r"(\{[^{}]*\})?", " ", text)
    layout = r"\\(setlength|begin|end|multicolumn|cmidrule|companion|paperfigure\*?)"
    return re.sub(layout + r"((\(|\{|\[)[^]{}()]*(\)|\}|\]))*", " ", text)


def test_no_measured_number_is_typed(source: str) -> None:
    """Digits are marked as settings, stand in mathematics, or come from a record."""
    typed = re.findall(r"[^\n]*\d[^\n]*", plain(source))
    names = r"SmolLM2(-135M(-Instruct)?)?|Gemma-3-270M|Llama-(2-7B|3\.1-8B|2-13B)|Wikitext-2|INT4"
    allowed = re.compile(rf"{names}|[AH][12]00|\b[78]B\b")
    assert not [line for line in typed if re.search(r"\d", allowed.sub("", line))]


def test_decimals_are_never_fixed_without_a_source(source: str) -> None:
    """A marked number with a decimal point is a bar or a percentile, or has a citation near it."""
    bars = {"0.98", "99.9"}
    for found in re.finditer(r"\\fixed\{([^{}]*\.[^{}]*)\}", source):
        near = source[max(0, found.start() - 200) : found.end() + 200]
        assert found[1] in bars or r"\cite" in near, found[1]


def test_the_test_finds_a_typed_number(source: str) -> None:
    assert re.search(r"\d", plain(source.replace("The key-value cache", "The 3.4 bit cache", 1)))


def test_every_reference_is_in_the_bibliography(root: Path, source: str) -> None:
    entries = re.findall(r"^@\w+\{(\w+),", (root / "paper/references.bib").read_text(), re.M)
    cited = {c.strip() for found in re.findall(r"\\cite[tp]?\{([^{}]*)\}", source)
             for c in found.split(",")}  # fmt: skip
    assert cited == set(entries) and len(entries) == len(set(entries))


def test_every_entry_has_what_a_reader_needs(root: Path) -> None:
    text = (root / "paper/references.bib").read_text(encoding="utf-8")
    for entry in re.split(r"^@", text, flags=re.M)[1:]:
        assert all(
            re.search(rf"^\s*{field}\s*=", entry, re.M) for field in ("author", "title", "year")
        )
        assert re.search(r"^\s*(journal|booktitle)\s*=", entry, re.M), entry.splitlines()[0]


def test_labels_and_references_agree(source: str) -> None:
    labels = set(re.findall(r"\\label\{([^{}#]+)\}", source))
    labels |= set(
        re.findall(r"\\paperfigure\*?(?:\([^)]*\))?(?:\[[^]]*\])?\{[^{}]+\}\{([^{}]+)\}", source)
    )
    labels |= {f"generated:{name}" for name in ("claims", *TABLES)}
    used = set(re.findall(r"\\ref\{([^{}]+)\}", source))
    assert used <= labels
    assert {label for label in labels if label.startswith(("fig:", "tab:"))} <= used
