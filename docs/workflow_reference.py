"""Writes docs/workflow-reference.md from the rule files and the typed configuration.

Wildcards and folders are described by comments beside them in `workflow/`, rules by their
docstrings, keys by their fields in `kvquant/study/`. `python docs/workflow_reference.py` writes the
page, and a test holds the page to its sources.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.json_schema import GenerateJsonSchema, NoDefault

from kvquant.study.config import Study, json_schema

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/workflow-reference.md"
HEAD = """# Reference of the workflow

<!-- Written by `python docs/workflow_reference.py`: edit the rules or `kvquant/study/`. -->

How the workflow is used is in [workflow.md](workflow.md), what a study means and how variants are
written in [config/README.md](../config/README.md).
"""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Formats a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


# --- rule files


class Rule(NamedTuple):
    """A rule as its file has it."""

    name: str
    text: str = ""
    docstring: str = ""
    verb: str = ""
    same_as: str = ""
    outputs: tuple[str, ...] = ()


def _block(text: str, keyword: str) -> str:
    """Returns the indented lines below `keyword:`, or nothing."""
    found = re.search(rf"^( *){keyword}:.*\n((?:\1 +.*\n|\n)*)", text + "\n", re.M)
    return found[2] if found else ""


def _assignments(text: str, keyword: str) -> Iterator[tuple[str, str, str]]:
    """Yields (name, value, comment) of the lines below `keyword:`."""
    for line in _block(text, keyword).splitlines():
        if found := re.fullmatch(r" +(\w+)=(.+?),(?: +# (.+))?", line):
            yield found[1], found[2], found[3] or ""


def rules() -> list[Rule]:
    """Reads every rule in the order in which the Snakefile includes their files."""
    snakefile = (ROOT / "workflow/Snakefile").read_text(encoding="utf-8")
    texts = [
        (ROOT / "workflow" / name).read_text(encoding="utf-8")
        for name in re.findall(r'^include: "(.+)"$', snakefile, re.M)
    ]
    found: dict[str, Rule] = {}
    starts = re.compile(r"^(?:rule (\w+):|use rule (\w+) as (\w+))", re.M)
    for text in [*texts, snakefile]:
        for start in starts.finditer(text):
            end = re.compile(r"^\S", re.M).search(text, start.end())
            body = text[start.end() : end.start() if end else None]
            paths = re.findall(r'"(<[^"]+)"', _block(body, "output"))
            outputs = tuple(path.replace("{{", "{").replace("}}", "}") for path in paths)
            if start[2]:
                doc = found[start[2]].docstring
                found[start[3]] = Rule(start[3], docstring=doc, outputs=outputs, same_as=start[2])
                continue
            doc = re.search(r'"""(.+?)"""', body, re.S)
            verb = re.search(r"python -m kvquant ((?:bench )?[\w-]+)", body)
            found[start[1]] = Rule(
                start[1],
                body,
                " ".join(doc[1].split()) if doc else "",
                verb[1] if verb else "",
                outputs=outputs,
            )
    return list(found.values())


def wildcards() -> dict[str, str]:
    """Returns {wildcard: meaning} as the comments in common.smk tell it."""
    text = (ROOT / "workflow/rules/common.smk").read_text(encoding="utf-8")
    found = {name: comment for name, _, comment in _assignments(text, "wildcard_constraints")}
    for rule in rules():
        own = _assignments(rule.text, "wildcard_constraints")
        found |= {name: comment or f"a {name} of the study" for name, _, comment in own}
    return found


def _workflow_lines() -> Iterator[str]:
    snakefile = (ROOT / "workflow/Snakefile").read_text(encoding="utf-8")
    all_rules = rules()
    yield from ("## Wildcards", "", "A value that is not allowed fails while jobs are planned.", "")
    users = {
        name: [rule.name for rule in all_rules if any(f"{{{name}}}" in o for o in rule.outputs)]
        for name in wildcards()
    }
    rows = [(f"`{{{n}}}`", text, ", ".join(users[n])) for n, text in wildcards().items()]
    yield from _table(("wildcard", "is", "in the outputs of"), rows)
    yield from ("", "## Folders", "", "The key `pathvars` of a study names others.", "")
    folders = _assignments(snakefile, "pathvars")
    rows = [(f"`<{name}>`", f"`{value[1:-1]}`", comment) for name, value, comment in folders]
    yield from _table(("folder", "default", "holds"), rows)
    yield from ("", "## Rules", "")
    rows = [
        (f"`{r.name}`", f"`{r.verb}`", " ".join(f"`{o}`" for o in r.outputs), r.docstring)
        for r in all_rules
        if r.verb
    ]
    yield from _table(("rule", "verb", "outputs", "makes"), rows)
    yield from ("", "## Targets", "", "Besides rules without wildcards and every file:", "")
    rows = [
        (f"`{r.name}`", f"`{r.same_as}`" if r.same_as else "", r.docstring)
        for r in all_rules
        if not r.verb
    ]
    yield from _table(("target", "same as", "makes"), rows)


# --- keys of a study


class _WithDefaults(GenerateJsonSchema):
    """States defaults that a function makes, too, such as those of empty lists."""

    def get_default_value(self, schema: Any) -> Any:
        """Returns the default of a field."""
        found = super().get_default_value(schema)
        made = schema.get("default_factory")
        return made() if found is NoDefault and made is not None else found


class _Keys:
    """The keys of the JSON schema, a section per mapping, in the order in which they are met."""

    def __init__(self) -> None:
        self.schema = Study.model_json_schema(schema_generator=_WithDefaults)
        self.schema["properties"]["base"] = json_schema()["properties"]["base"]
        self.headings: dict[str, str] = {}
        self.waiting: list[str] = []

    def _mapping(self, name: str) -> dict[str, Any]:
        """Returns the schema of a mapping, also of one that may be written as a plain value."""
        schema = self.schema["$defs"][name]
        return next((s for s in schema.get("anyOf", []) if "properties" in s), schema)

    def _link(self, reference: str, path: str) -> str:
        """Returns a link to the section of a mapping, which is written when its turn comes."""
        name = reference.rsplit("/", 1)[1]
        if name not in self.headings:
            properties = self._mapping(name)["properties"]
            tags = [f" ({n}: {p['const']})" for n, p in properties.items() if "const" in p]
            self.headings[name] = "".join([path, *tags])
            self.waiting.append(name)
        heading = self.headings[name]
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        tag = re.search(r": (.+)\)$", heading)
        return f"[{tag[1] if tag else heading}](#{anchor})"

    def _type(self, schema: dict[str, Any], path: str) -> str:
        """Returns the type of a value with its limits."""
        if "$ref" in schema:
            return self._link(schema["$ref"], path)
        if "const" in schema or "enum" in schema:
            return " or ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                kinds = [self._type(s, path) for s in schema[key] if s.get("type") != "null"]
                return " or ".join(kinds)
        if schema["type"] == "array":
            return f"list of {self._type(schema['items'], path)}"
        if schema["type"] == "object" and "properties" not in schema:
            inner = self._type(schema["additionalProperties"], f"{path}.NAME")
            return f"mapping of names to {inner}"
        limits = {
            "minimum": "at least {}",
            "exclusiveMinimum": "more than {}",
            "maximum": "at most {}",
            "exclusiveMaximum": "less than {}",
            "multipleOf": "a multiple of {}",
            "pattern": "`{}`",
        }
        told = [text.format(schema[key]) for key, text in limits.items() if key in schema]
        return ", ".join([schema["type"], *told])

    def _default(self, schema: dict[str, Any], required: bool) -> str:
        """Returns the value of a key that a file leaves out."""
        if required:
            return "required"
        default = schema.get("default")
        if default is None:
            return "absent"
        if default == {}:
            return "none"
        return "see there" if "$ref" in schema else f"`{json.dumps(default)}`"

    def _section(self, schema: dict[str, Any], path: str) -> Iterator[str]:
        needed = schema.get("required", schema.get("else", {}).get("required", []))
        rows = []
        for name, value in schema["properties"].items():
            where = f"{path}.{name}".lstrip(".")
            if not (text := value.get("description", "")):
                raise SystemExit(f"{where}: the field has no description")
            row = (
                f"`{name}`",
                self._type(value, where),
                self._default(value, name in needed),
                text,
            )
            rows.insert(0 if "const" in value else len(rows), row)
        yield from _table(("key", "type", "default", "meaning"), rows)

    def lines(self) -> Iterator[str]:
        """Yields all sections, the study's own keys first."""
        yield from ("## Keys of a study", "")
        yield from self._section(self.schema, "")
        while self.waiting:
            name = self.waiting.pop(0)
            schema = self._mapping(name)
            about = " ".join(schema.get("description", "").split())
            yield from ("", f"### {self.headings[name]}", "", about, "")
            yield from self._section(schema, self.headings[name].split(" (")[0])


def page() -> str:
    """Returns the whole page."""
    return "\n".join([HEAD, *_workflow_lines(), "", *_Keys().lines()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
