"""Pages of the site that lie outside `docs/`, and links between all pages and the repository."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

# page of the repository: page of the site
PAGES = {
    "config/README.md": "study-files.md",
    "results/README.md": "results-folder.md",
    "results/published/README.md": "published-records.md",
    "envs/README.md": "environments.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
MEASURED, EXAMPLES, EXPLORER = "measured.md", "examples.md", "explorer.md"
MADE_EXPLORER = "results/h100/explorer.html"  # by `snakemake explorer`, from published records
SOURCES = {site: source for source, site in PAGES.items()} | {
    MEASURED: "README.md",
    EXAMPLES: "examples/README.md",
    EXPLORER: "docs/workflow.md",
}
LINK = re.compile(r"(?P<start>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def _measured(root: Path) -> str:
    """Returns the README's table of what has been measured, as a page."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    return "# What has been measured\n" + readme.split("\n## State\n")[1].split("\nLicence:")[0]


def _examples(root: Path) -> str:
    """Returns the scripts of `examples/`, as a page."""
    lines = ["# Examples", "", "Scripts of the repository that run with any model."]
    for script in sorted((root / "examples").glob("*.py")):
        code = script.read_text(encoding="utf-8")
        lines += ["", f"## {script.name}", "", "```python", code.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _explorer(root: Path) -> str:
    """Returns the page that leads to the explorer of the published study, or says how to make it.

    Making it takes a minute, which not every build of the site should cost.
    """
    workflow = (root / "docs/workflow.md").read_text(encoding="utf-8")
    about = workflow.split("\n## The explorer\n")[1].split("\n\n")[0]
    if (root / MADE_EXPLORER).is_file():
        start = f"[Open the explorer](../{MADE_EXPLORER}){{ .md-button .md-button--primary }}"
    else:
        start = (
            "This site was built without it. In a clone of the repository, "
            f"`uv run snakemake -c2 explorer` makes `{MADE_EXPLORER}` from the published records "
            "in about a minute, and the next build of the site has it here."
        )
    return f"# Explore all results\n\n{start}\n\n{about}\n"


def pages(root: Path) -> dict[str, str]:
    """Returns {page of the site: text} of the pages outside `docs/`."""
    found = {site: (root / source).read_text(encoding="utf-8") for source, site in PAGES.items()}
    made = {MEASURED: _measured(root), EXAMPLES: _examples(root), EXPLORER: _explorer(root)}
    return found | made


def _target(root: Path, name: str, link: str) -> PurePosixPath | None:
    """Returns the file of the repository that a link of a page leads to, if it leads to one."""
    if re.match(r"[a-z]+:", link):
        return None
    folder = PurePosixPath(SOURCES.get(name, f"docs/{name}")).parent
    found = PurePosixPath(os.path.normpath(folder / link))
    return found if (root / found).exists() else None


def _place(target: PurePosixPath) -> str:
    """Returns where the site has a file of the repository."""
    if target.is_relative_to("docs"):
        return str(target.relative_to("docs"))
    if target.parent.name == "examples":
        return f"{EXAMPLES}#{target.name.replace('.', '')}"
    return {**PAGES, "README.md": "index.md"}.get(str(target), f"files/{target}")


def linked_files(root: Path, texts: Mapping[str, str]) -> dict[str, bytes]:
    """Returns {place: content} of the files outside `docs/` that pages link to."""
    found: dict[str, bytes] = {}
    for name, text in texts.items():
        for link in LINK.finditer(text):
            target = _target(root, name, link["target"])
            if target is None or not (root / target).is_file():
                continue
            if (place := _place(target)).startswith("files/"):
                found[place] = (root / target).read_bytes()
    return found


def site_text(root: Path, name: str, text: str) -> str:
    """Returns the text of a page with the links of the site.

    A link to a folder becomes its text, as a site has no page of it.
    """

    def replaced(link: re.Match[str]) -> str:
        target = _target(root, name, link["target"])
        if target is None:
            return link[0]
        if (root / target).is_dir():
            return link["text"]
        place, anchor = _place(target), link["anchor"] or ""
        if place == "index.md" and anchor:
            place, anchor = MEASURED, ""  # the one part of the README that is a page
        return f"{link['start']}{os.path.relpath(place, PurePosixPath(name).parent)}{anchor})"

    # A forge reads a table behind a comment as one, and Python's Markdown as text.
    text = re.sub(r"(-->)\n(\|)", r"\1\n\n\2", text)
    text = re.sub(r"(\|)\n(<!--)", r"\1\n\n\2", text)
    return LINK.sub(replaced, text)
