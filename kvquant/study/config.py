"""Reads, validates and digests a study, without importing torch.

The YAML files under ``config/`` are instances of :class:`Study`. The Snakefile and the CLI both
read them through :func:`load_study`, and ``config/schema.json`` is exported from the same classes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from kvquant.errors import UserError, unknown
from kvquant.study.checks import problems
from kvquant.study.overlay import read_study
from kvquant.study.own_texts import with_hashes
from kvquant.study.scheme_kinds import SCHEME_KINDS
from kvquant.study.sections import StudySections
from kvquant.study.tasks import SUITES
from kvquant.study.timing import TimedStage
from kvquant.study.wording import LABEL


class Study(StudySections):
    """A complete and consistent study, as one YAML file under config/ describes it."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        found = list(problems(self))
        if found:
            raise ValueError("\n".join(found))
        return self

    def _chosen(self, scheme: str) -> bool:
        return scheme in (self.evaluation.schemes or self.schemes)

    def evaluates(self, scheme: str, task: str) -> bool:
        """Returns whether a scheme is chosen for a task and can run the task's protocol."""
        if not self._chosen(scheme) or task not in self.evaluation.tasks.get(scheme, [task]):
            return False
        return self.task(task).cache_protocol() in self.scheme(scheme).protocols

    def eval_cells(self) -> list[tuple[str, str]]:
        """Returns (scheme, task) of every evaluation job per model."""
        return [(s, t) for s in self.schemes for t in self.tasks if self.evaluates(s, t)]

    def _cells(self, spec: TimedStage) -> list[tuple[str, str, int]]:
        timed = self.timed_schemes(spec)
        return [
            (scheme, name, rep)
            for name, workload in spec.workloads.items()
            for scheme in timed
            if not workload.schemes or scheme in workload.schemes
            for rep in range(spec.reps)
        ]

    def throughput_cells(self) -> list[tuple[str, str, int]]:
        """Returns (scheme, workload, rep) of every throughput job per model."""
        return self._cells(self.throughput)

    def energy_cells(self) -> list[tuple[str, str, int]]:
        """Returns (scheme, workload, rep) of every energy job per model."""
        return self._cells(self.energy)

    def append_reps(self) -> int:
        """Returns the number of append jobs per model; 0 where appends are not measured."""
        return self.append.reps if self.append else 0

    def append_schemes(self) -> list[str]:
        """Returns the schemes of the append measurement; empty where appends are not measured."""
        if self.append is None:
            return []
        chosen = self.append.schemes or [self.baseline, self.headline]
        return [s for s in dict.fromkeys(chosen) if s in self.schemes]


def digest(*specs: BaseModel | dict[str, Any] | list[Any] | str | int | None) -> str:
    """Returns 16 digits of the sha256 of specifications, taken over their canonical JSON.

    The label of a specification does not count; those of entries inside it do.
    """
    plain = [
        s.model_dump(mode="json", exclude={LABEL}) if isinstance(s, BaseModel) else s for s in specs
    ]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_study(raw: Any, where: str = "config") -> Study:
    """Validates a plain mapping as a study.

    Args:
        raw: The content of a study file.
        where: The name of the file in messages.

    Raises:
        UserError: The study is invalid, and the message has one line per wrong field; or a file of
            its own data sets cannot be read.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a mapping of keys, got {type(raw).__name__}")
    try:
        found = Study.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            tags = {*SCHEME_KINDS, *SUITES}
            tagged = item["loc"][:1] in (
                ("schemes",),
                ("tasks",),
            )  # the third part is the kind or the suite
            path = ".".join(
                str(p) for i, p in enumerate(item["loc"]) if not (tagged and i == 2 and p in tags)
            )
            message = item["msg"].removeprefix("Value error, ")
            # Of a wrong kind or suite pydantic names no key and offers no similar word.
            if item["type"] == "union_tag_invalid":
                tag, key = str(item["ctx"]["tag"]), str(item["ctx"]["discriminator"]).strip("'")
                path += f".{key}"
                message = str(unknown(key, tag, SCHEME_KINDS if key == "kind" else SUITES))
            if item["type"] == "union_tag_not_found":
                path += "." + str(item["ctx"]["discriminator"]).strip("'")
                message = "missing"
            if item["type"] == "lossy":
                path = ".".join(filter(None, (path, str(item["ctx"]["field"]))))
            if not path:  # problems of the study as a whole, one per line
                lines += [f"{where}: {line}" for line in message.splitlines()]
                continue
            if item["type"] == "extra_forbidden":
                message = (
                    f"unknown key; known keys: {', '.join(sorted(Study.model_fields))}"
                    if (len(item["loc"]) == 1)
                    else "unknown key"
                )
            given = item.get("input")
            shown = f" (got {given!r})" if isinstance(given, str | int | float) else ""
            lines.append(f"{where}: {path + ': ' if path else ''}{message}{shown}")
        raise UserError("\n".join(lines)) from None
    if not found.datasets:
        return found
    return found.model_copy(update={"datasets": with_hashes(found.datasets)})


def load_study(path: str | Path) -> Study:
    """Reads and validates a study from a YAML or JSON file.

    Raises:
        UserError: The file cannot be read, or the study is invalid.
    """
    return parse_study(read_study(path), where=str(path))


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a study file, as committed in config/schema.json.

    A file with a `base` may leave out the keys that a study requires.
    """
    schema = Study.model_json_schema()
    text = "study file that this one is a variant of, relative to its folder; see config/README.md"
    schema["properties"]["base"] = {"type": "string", "title": "Base", "description": text}
    return schema | {"if": {"required": ["base"]}, "else": {"required": schema.pop("required")}}
