"""A Markdown extension by which wide tables and drawings can be read on a phone."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

COLUMNS = 3  # from which a narrow screen stacks the cells of a row
MANY = 9  # from which it sets short cells side by side


class _Labels(Treeprocessor):
    """Tells each cell of a wide table the head of its column, which `site.css` shows."""

    def run(self, root: Element) -> None:
        """Marks the tables of a page."""
        for table in root.iter("table"):
            heads = ["".join(head.itertext()).strip() for head in table.iter("th")]
            if len(heads) < COLUMNS:
                continue
            table.set("data-columns", "many" if len(heads) >= MANY else "some")
            for row in table.iterfind("tbody/tr"):
                for head, cell in zip(heads, row.iterfind("td"), strict=False):
                    cell.set("data-head", head)


class _Links(Treeprocessor):
    """Makes each drawing a link to itself, where a phone can enlarge it."""

    def run(self, root: Element) -> None:
        """Wraps the images of a page."""
        for parent in list(root.iter()):
            for place, image in enumerate(list(parent)):
                if image.tag != "img" or parent.tag == "a":
                    continue
                link = Element("a", href=image.get("src", ""), title="Open this drawing alone")
                link.tail, image.tail = image.tail, None
                parent.remove(image)
                parent.insert(place, link)
                link.append(image)


class SmallScreens(Extension):
    """Registers both behind the processor of inline text, which makes heads and images."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Adds the processors to a Markdown converter."""
        md.treeprocessors.register(_Labels(md), "stacked-tables", 5)
        md.treeprocessors.register(_Links(md), "linked-drawings", 4)
