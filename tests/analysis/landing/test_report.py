"""The report as readers see it: Snakemake makes it, and a browser shows it.

The landing page comes first, and every result is visited from it and its caption read. Tests need
Chromium and are skipped without one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvquant.analysis import report
from kvquant.analysis.figure_list import FIGURES
from kvquant.analysis.html_tables import caption_of, table_of
from tests.analysis.landing.conftest import RESULTS, Written
from tests.support.chromium import Page, page_or_skip

pytestmark = pytest.mark.slow
WIDE, NARROW = (1280, 900), (400, 900)
LANDING = "document.querySelector('.landing')"
BOX = "document.querySelector('#app > div > div.grow')"  # what shows a result or the landing page
# What a caption must not hold: fields, templates, marks of reStructuredText, escapes, markup, keys.
LEFT_OVER = re.compile(
    r"\{\{|\{%|\}\}|%\}|\{\w+\}|``|::|`_|\|\w+\||\\|</?\w+>|&\w+;|\bNone\b|\bnan\b|TODO|\w_\w"
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page_or_skip(tmp_path_factory.mktemp("profile"), WIDE) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(tab: Page, written: Written, root: Path) -> Path:
    """The report of the small study, made as the rule `report_page` makes it."""
    out = RESULTS / "report.html"
    given = {"snakefile": root / "Snakefile", "study": RESULTS / "study.json", "out": out}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(written.work)
        patch.setenv("PYTHONPATH", str(root))
        report.run(argparse.Namespace(**given))
    return written.work / out


def opened(tab: Page, file: Path) -> None:
    tab.open(file)
    tab.wait_for(LANDING)


def back(tab: Page) -> None:
    """Goes back to the landing page by the house in the menu."""
    tab.evaluate("document.querySelector('nav ol a').click()")
    tab.wait_for(LANDING)


def follow(tab: Page, key: str) -> None:
    """Goes to the first link of the landing page to a result, by keyboard."""
    link = f"document.querySelector('.landing a[data-result={json.dumps(key)}]')"
    tab.evaluate(f"{link}.focus()")
    tab.press("Enter")
    tab.wait_for("document.querySelector('nav .prose')")


def test_the_landing_page_comes_first(tab: Page, file: Path, written: Written) -> None:
    opened(tab, file)
    assert tab.texts(".landing h1") == [written.measured.study.title]
    assert tab.evaluate(f"{LANDING}.getBoundingClientRect().top") < 60  # seen at once
    assert len(tab.texts(".landing figure img")) == 2
    shown = "[...document.querySelectorAll('.landing figure img')].every((i) => i.naturalWidth)"
    tab.wait_for(shown)
    assert tab.errors == []


def test_it_fits_wide_and_narrow_windows(tab: Page, file: Path) -> None:
    for size in (WIDE, NARROW):
        tab.size(*size)
        opened(tab, file)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate(f"{BOX}.scrollWidth <= {BOX}.clientWidth")
        assert tab.evaluate(f"{BOX}.clientWidth") >= 0.75 * size[0]
        cut = f"[...{LANDING}.querySelectorAll('p, th, td, li, dd, pre')].filter((e) => "
        cut += "e.getClientRects().length && e.scrollWidth > e.clientWidth + 1 && "
        cut += "getComputedStyle(e).display !== 'inline').map((e) => e.textContent)"
        assert tab.evaluate(cut) == []
    tab.size(*WIDE)


def test_its_texts_contrast_with_white(tab: Page, file: Path) -> None:
    opened(tab, file)
    ratio, text = tab.contrast(".landing")
    assert ratio >= 4.5, text


def test_every_result_has_its_caption(tab: Page, file: Path, written: Written) -> None:
    """Visits each result from the landing page, and nothing is loaded from outside on the way."""
    study, tables = written.measured.study, written.work / written.args.tables
    expected = {Path(f).stem: FIGURES[Path(f).stem].caption for f in written.args.figures}
    expected |= {f"{name}.html": caption_of(study, name, table_of(study, tables, name))
                 for name in (page.stem for page in written.args.pages)}  # fmt: skip
    opened(tab, file)
    keys = tab.evaluate("Object.keys(results)")
    assert len(keys) == len(written.args.figures) + len(written.args.pages) + 1
    for key in keys:
        back(tab)
        follow(tab, key)
        (caption,) = (text.strip() for text in tab.texts("nav .prose"))
        name = Path(key).name if key.endswith(".html") else Path(key).stem
        assert caption and caption == expected.get(name, caption), key
        assert not LEFT_OVER.search(caption), (key, caption)
        labels = " ".join(tab.texts("nav table td"))
        assert labels.strip() and not LEFT_OVER.search(labels), (key, labels)
        kind = "iframe" if key.endswith(".html") else "div.p-3 > img"
        assert len(tab.texts(f"#app > div > div.grow {kind}")) == 1, key
    assert tab.errors == []
    assert {request.partition(":")[0] for request in tab.requests} == {"file", "data"}
    assert [r for r in tab.requests if r.startswith("file:")] == [file.as_uri()]


def test_a_view_of_the_explorer_is_opened(tab: Page, file: Path) -> None:
    opened(tab, file)
    tab.evaluate("document.querySelector('.landing a[href$=\"#view=claims\"]').focus()")
    tab.press("Enter")
    tab.wait_for("document.querySelector('iframe')")
    assert tab.evaluate("document.querySelector('iframe').src").endswith("#view=claims")
