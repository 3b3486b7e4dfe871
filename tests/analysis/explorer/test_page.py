"""The explorer's page: what is inside it, and what a browser makes of it.

Tests of the second kind need Chromium and are skipped without one.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.analysis.explorer import page as page_module
from kvquant.analysis.explorer.page import HERE, SCRIPTS, json_inside, page
from kvquant.analysis.labels import labels_of
from kvquant.analysis.pareto import dominated
from tests.support.chromium import Page, page_or_skip
from tests.support.measured import HOSTILE, Measured

WIDE, NARROW = (1280, 900), (400, 900)


@given(st.text(alphabet='<>&\u2028\u2029\u2030a"\\{}', max_size=20))
def test_data_survives_inside_html(text: str) -> None:
    inside = json_inside({"a": text})
    assert json.loads(inside) == {"a": text}
    assert not set("<>&\u2028\u2029") & set(inside)


def test_the_page_holds_all_that_it_needs(measured: Measured) -> None:
    text = page(measured.data)
    assert text == page(measured.data)
    assert HOSTILE not in text and text.count("<script") == 1 + len(SCRIPTS)
    assert "{{" not in text.replace(json_inside(measured.data), "")
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", "".join(
        (HERE / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "page.html", "page.css")
    ))  # fmt: skip
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name, which nothing loads
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy and policy[1].startswith("default-src 'none'") and "unsafe" not in policy[1]


def test_the_verb_writes_the_page(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "sub/explorer.html"
    study = str(measured.results / "study.json")
    tables = measured.results / "tables"
    page_module.run(argparse.Namespace(study=study, tables=tables, out=file))
    assert file.read_text(encoding="utf-8") == page(measured.data)


@pytest.fixture(scope="module")
def explorer(measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "explorer.html"
    file.write_text(page(measured.data), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page_or_skip(tmp_path_factory.mktemp("profile"), WIDE) as opened:
        yield opened


def column(tab: Page, name: str) -> list[str]:
    """The texts of a column of the table, by its name in links."""
    heads = "[...document.querySelectorAll('thead button')]"
    place = tab.evaluate(f"{heads}.findIndex((b) => b.dataset.column === {name!r})")
    assert place >= 0, name
    return tab.texts(f"tbody tr > :nth-child({place + 1})")


def rows_of(measured: Measured, view: str) -> int:
    found = next(v["data"] for v in measured.data["views"] if v["name"] == view)
    return len(found["rows"])


def test_every_view_loads_alone_and_fits_the_window(
    tab: Page, explorer: Path, measured: Measured
) -> None:
    for width, height in (WIDE, NARROW):
        tab.size(width, height)
        for view in measured.data["views"]:
            tab.open(explorer, f"view={view['name']}")
            assert tab.texts("h2") == [view["label"]]
            assert tab.texts("nav [aria-current=page]") == [view["label"]]
            assert tab.requests == [explorer.as_uri() + f"#view={view['name']}"] or (
                tab.requests == [explorer.as_uri()]
            )
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), view["name"]
            if view["kind"] == "table":
                assert len(tab.texts("tbody tr")) == rows_of(measured, view["name"])
    tab.size(*WIDE)
    assert tab.errors == []


def test_names_are_texts_whatever_is_in_them(tab: Page, explorer: Path, measured: Measured) -> None:
    tab.open(explorer, "view=schemes")
    assert HOSTILE.replace("\u2028", "").strip() in tab.texts("h1")[0]
    assert labels_of(measured.study).scheme("nuq3") in column(tab, "scheme")
    assert tab.evaluate("document.querySelectorAll('img, tbody b').length") == 0
    assert tab.errors == []


def test_a_link_filters_and_sorts(tab: Page, explorer: Path) -> None:
    tab.open(explorer, "view=tasks&suite=passkey&family=ours,peers&model=Other+model&sort=-value")
    assert set(column(tab, "suite")) == {"passkey"} and set(column(tab, "model")) == {"Other model"}
    assert "16-bit" not in column(tab, "family")
    *numbers, last = column(tab, "value")
    assert last == "not measured"  # in either order
    assert numbers == sorted(numbers, key=float, reverse=True) and len(numbers) == 2
    assert tab.texts("th[aria-sort=descending]") == ["score \u25bc"]
    (status,) = tab.texts("#status")
    assert ": 3 of " in status and "passkey" in status and "ours and peers" in status
    tab.open(explorer, "view=tasks&min=3.0&max=5")
    bits = [float(text) for text in column(tab, "bits")]
    assert bits and all(3 <= value <= 5 for value in bits)
    assert "without measured bits are left out" in tab.texts("#status")[0]
    tab.open(explorer, "view=tasks&q=quanto+RULER")
    assert set(column(tab, "scheme")) == {"Quanto 4 bits"}
    assert set(column(tab, "suite")) == {"RULER"}


def test_what_a_link_says_wrong_is_told(tab: Page, explorer: Path, measured: Measured) -> None:
    tab.open(explorer, "view=tasks&suite=nope&color=red&sort=nope")
    (told,) = tab.texts("#problems")
    assert all(word in told for word in ("suite=nope", "color=red", "sort=nope"))
    assert len(tab.texts("tbody tr")) == rows_of(measured, "tasks")


def test_names_that_every_object_has_are_not_known(tab: Page, explorer: Path) -> None:
    """They are looked up among the page's own names alone, and the page shows the rest."""
    wrong = ["__proto__=a", "toString=b", "constructor=c", "depth=length", "depth=map"]
    tab.open(explorer, f"view=passkeys&{'&'.join(wrong[:4])}")
    (told,) = tab.texts("#problems")
    assert all(word in told for word in wrong[:4]) and tab.texts("tbody tr")
    tab.open(explorer, f"view=passkeys&{wrong[4]}")
    assert wrong[4] in tab.texts("#problems")[0] and tab.texts("tbody tr")
    assert tab.errors == []


def test_heads_sort_by_keyboard_and_the_address_keeps_it(tab: Page, explorer: Path) -> None:
    tab.open(explorer, "view=schemes")
    tab.evaluate("document.querySelector('button[data-column=bits]').focus()")
    for order, kept in (("ascending", "sort=bits"), ("descending", "sort=-bits"), ("none", "")):
        tab.press("Enter")
        head = "document.activeElement.closest('th').getAttribute('aria-sort')"
        assert tab.evaluate(head) == order
        assert kept in tab.evaluate("location.hash")
    assert tab.evaluate("location.hash") == ""


def test_the_frontier_is_the_studys(tab: Page, explorer: Path, measured: Measured) -> None:
    tab.open(explorer, "view=scatter&x=bits&y=loss-ruler&model=Other+model")
    axes = {
        a["name"]: a for v in measured.data["views"] if v["name"] == "scatter" for a in v["data"]
    }
    x, y = ({s: c["v"] if isinstance(c, dict) else c for m, s, c in axes[name]["points"] if m == 1}
            for name in ("bits", "loss-ruler"))  # fmt: skip
    both = sorted(x.keys() & y.keys())
    assert len(both) >= 3
    beaten = dominated(np.array([[x[s], y[s]] for s in both], dtype=float))
    names = [s["name"] for s in measured.data["schemes"]]
    front = {names[s] for s, b in zip(both, beaten, strict=True) if not b}
    said = dict(zip(column(tab, "scheme"), column(tab, "front"), strict=True))
    assert {name for name, words in said.items() if words == "on the frontier"} == front
    assert set(said) == {names[s] for s in both}
    assert len(tab.texts(".mark")) == len(both)
    absent = tab.texts("#drawing details li")
    assert len(absent) == len(names) - len(both)


def test_markers_are_reached_by_keyboard(tab: Page, explorer: Path) -> None:
    tab.open(explorer, "view=scatter")
    assert (
        len(tab.evaluate("[...document.querySelectorAll('.mark[tabindex=\"0\"]')].map(String)"))
        == 1
    )
    tab.evaluate("document.querySelector('.mark[tabindex=\"0\"]').focus()")
    seen = []
    for key in ("Home", "ArrowRight", "End"):
        tab.press(key)
        seen.append(tab.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert tab.texts("#details strong")[0] in seen[-1]
    assert len(set(seen)) == 3
    key = tab.evaluate("document.activeElement.dataset.scheme")
    tab.press("Enter")
    tab.press("Enter")  # follows the link of the details
    assert tab.evaluate("location.hash") == f"#view=tasks&scheme={key}"
    assert len(set(column(tab, "scheme"))) == 1


def test_shown_rows_are_saved_as_csv(tab: Page, explorer: Path) -> None:
    tab.open(explorer, "view=tasks&suite=passkey&sort=-value")
    text = tab.evaluate("csv(shown.sheet, shown.rows)")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["scheme"] for row in rows] == column(tab, "scheme")
    assert rows[-1]["score"] == "not measured"
    assert all(re.fullmatch(r"-?[\d.e-]+", row["score"]) for row in rows[:-1])
    assert {"loss [95 % interval]: from", "loss [95 % interval]: to"} <= set(rows[0])
    assert tab.evaluate("harmless('=1+1')") == "'=1+1"


def test_passkey_maps_say_their_shares(tab: Page, explorer: Path) -> None:
    tab.open(explorer, "view=passkeys&depth=1&family=ours")
    shares = column(tab, "length0")
    assert len(shares) == 2 and all(0 <= float(share) <= 100 for share in shares)
    assert len(tab.texts("td.shade")) == 2


@pytest.mark.parametrize("dark", [False, True])
def test_texts_contrast_with_what_is_behind_them(tab: Page, explorer: Path, dark: bool) -> None:
    tab.size(*WIDE, dark=dark)
    for view in ("schemes", "tasks", "scatter", "passkeys", "claims"):
        tab.open(explorer, f"view={view}")
        ratio, text = tab.contrast()
        assert ratio >= 4.5, (view, text)
    tab.size(*WIDE)
