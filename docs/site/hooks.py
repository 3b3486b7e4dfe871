"""Events of mkdocs by which the site shows what lies outside `docs/` and what is generated.

Pages of `docs/` are also read on a forge, so their links are those of the repository. `mkdocs.yml`
names this file; CONTRIBUTING.md says how the site is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import api_reference
import cli_reference
import outside_pages
import records_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify
from small_screens import SmallScreens

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {
    "cli-reference.md": cli_reference.page,
    "api.md": api_reference.page,
    "records.md": records_reference.page,
}

WIDE = ("concepts.md", "measured.md", "model-features.md")  # shown without a table of contents


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Gives headings the anchors of a forge, and tables and drawings a form for phones."""
    config.mdx_configs["toc"] = {"permalink": True, "slugify": slugify(case="lower")}
    config.markdown_extensions.append(SmallScreens())
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds generated pages, pages from outside `docs/`, and the files that pages link to."""
    contents: dict[str, str | bytes] = {name: made() for name, made in GENERATED.items()}
    contents |= outside_pages.pages(ROOT)
    sources = {name: text for name, text in contents.items() if isinstance(text, str)}
    sources |= {f.src_uri: f.content_string for f in files.documentation_pages()}
    contents |= outside_pages.linked_files(ROOT, sources)
    for name, content in contents.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turns links of the repository into links of the site, and gives wide pages their width."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return outside_pages.site_text(ROOT, page.file.src_uri, markdown)
