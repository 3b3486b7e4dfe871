"""`kvquant explorer`: writes all results of a study as one self-contained HTML page.

The page is a template with its style, its scripts and the study's data inside. Its policy names the
hashes of the style and of each script, so that a browser runs nothing else and loads nothing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvquant.analysis.explorer.data import data_of
from kvquant.analysis.explorer.source import load
from kvquant.formats.files import replace
from kvquant.study.config import load_study

HERE = Path(__file__).parent
# In the order in which the browser runs them; each sees what those before it define.
SCRIPTS = ("dom.js", "state.js", "table.js", "scatter.js", "maps.js", "main.js")


def _hash(text: str) -> str:
    """Returns the source of a policy that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def json_inside(value: Any) -> str:
    """Returns JSON that no HTML parser takes for the end of its element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def policy(style: str, scripts: Sequence[str]) -> str:
    """Returns the content security policy of a page that loads nothing and runs these alone.

    Args:
        style: The text of its style.
        scripts: The text of each of its scripts.
    """
    parts = ("default-src 'none'", "img-src data:", f"style-src {_hash(style)}")
    run = " ".join(map(_hash, scripts)) or "'none'"
    return "; ".join((*parts, f"script-src {run}", "base-uri 'none'", "form-action 'none'"))


def page(data: dict[str, Any]) -> str:
    """Returns the page; the same data gives the same page.

    Args:
        data: What :func:`kvquant.analysis.explorer.data.data_of` returned.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    scripts = [(HERE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    parts = {
        "POLICY": policy(style, scripts),
        "TITLE": html.escape(str(data["title"])),
        "STYLE": style,
        "DATA": json_inside(data),
        "SCRIPTS": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    before, *rest = (HERE / "page.html").read_text(encoding="utf-8").split("{{")
    text = before
    for piece in rest:
        name, _, after = piece.partition("}}")
        text += parts[name] + after
    return text


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    study = load_study(args.study)
    data = data_of(load(study, args.tables))
    replace(args.out, page(data))
    rows = sum(len(v["data"]["rows"]) for v in data["views"] if v["kind"] == "table")
    print(f"explorer: {args.out}: {len(data['views'])} views, {rows} rows")
