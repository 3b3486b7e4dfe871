"""The file of a task's prompts: made once for a model, read by the evaluation of every scheme.

Gzipped JSON Lines. The first line tells what the prompts are (:class:`Header`), each further line
is one prompt: its seed, its index, its tokens and what its answer is held against. The same prompts
are the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kvquant.errors import UserError
from kvquant.evaluation.base import encode
from kvquant.evaluation.generated import Prompt, SeedPrompts
from kvquant.files import write_new

SCHEMA_VERSION = 1
AGAIN = "make it with `kvquant prompts`"
# Tokenizers that differ in what matters here (words, digits, blanks, accents) differ in this text.
PROBE = "The pass key is 40718. Zürich\n\n  x = [1, 22];\tLe 3ème été naïf"


class SeedHeader(BaseModel):
    """A seed's share of the file: so many lines with this hash, and the seed's metrics."""

    model_config = ConfigDict(extra="forbid")

    seed: int
    prompts: int
    sha256: str
    max_new_tokens: int
    metrics: dict[str, float]


class Header(BaseModel):
    """The first line: what the prompts were made from; `probe` is :data:`PROBE` in tokens."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["prompts"] = "prompts"
    schema_version: Literal[1] = 1
    spec_digest: str
    spec: dict[str, Any]
    data_sha256: str | None
    packages: dict[str, str]
    probe: list[int]
    seeds: list[SeedHeader]


def probe(tokenizer: Any) -> list[int]:
    """What tells a tokenizer from others."""
    return encode(tokenizer, PROBE, special=True)


def _line(raw: dict[str, Any]) -> str:
    return json.dumps(raw, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"


def write_prompts(
    path: str | Path,
    seeds: dict[int, SeedPrompts],
    *,
    spec_digest: str,
    spec: dict[str, Any],
    data_sha256: str | None,
    packages: dict[str, str],
    probe: list[int],
) -> Header:
    """Writes the prompts of all seeds, in the order of the seeds.

    Raises:
        UserError: The file exists with other content.
    """
    headers, blocks = [], []
    for seed, found in sorted(seeds.items()):
        lines = "".join(
            _line(
                {
                    "seed": seed,
                    "index": index,
                    "tokens": prompt.tokens,
                    "record": prompt.record,
                    "scoring": prompt.scoring,
                }
            )
            for index, prompt in enumerate(found.prompts)
        ).encode()
        headers.append(
            SeedHeader(
                seed=seed,
                prompts=len(found.prompts),
                sha256=hashlib.sha256(lines).hexdigest(),
                max_new_tokens=found.max_new_tokens,
                metrics=found.metrics,
            )
        )
        blocks.append(lines)
    header = Header(
        spec_digest=spec_digest,
        spec=spec,
        data_sha256=data_sha256,
        packages=packages,
        probe=probe,
        seeds=headers,
    )
    content = b"".join([_line(header.model_dump(mode="json")).encode(), *blocks])
    write_new(path, gzip.compress(content, compresslevel=6, mtime=0))
    return header


class PromptFile:
    """A file of prompts whose header was checked."""

    def __init__(self, path: str | Path, spec_digest: str, seeds: Sequence[int]) -> None:
        """Reads the header.

        Args:
            path: The file.
            spec_digest: Of the specification that is asked for.
            seeds: Seeds that it must hold.

        Raises:
            UserError: It is missing, damaged, of another specification, or lacks a seed.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"--prompts: no such file: {self.path}: {AGAIN}")
        try:
            with gzip.open(self.path, "rb") as stream:
                self.header = Header.model_validate_json(stream.readline())
        except (OSError, EOFError, zlib.error, ValidationError):
            raise self._damaged() from None
        if self.header.spec_digest != spec_digest:
            raise UserError(
                f"--prompts: {self.path} holds the prompts of another specification (digest "
                f"{self.header.spec_digest}, expected {spec_digest}): {AGAIN}"
            )
        self._seeds = {entry.seed: entry for entry in self.header.seeds}
        if lacking := [str(seed) for seed in seeds if seed not in self._seeds]:
            raise UserError(
                f"--prompts: {self.path} holds no prompts of seed {', '.join(lacking)}, only of "
                f"{', '.join(map(str, self._seeds))}: {AGAIN}"
            )

    def _damaged(self) -> UserError:
        return UserError(f"--prompts: {self.path} is damaged: delete it by name and {AGAIN}")

    def sha256(self, seed: int) -> str:
        """Hash of a seed's prompts."""
        return self._seeds[seed].sha256

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses prompts in the tokens of another tokenizer.

        Raises:
            UserError: The tokenizer gives other tokens.
        """
        if probe(tokenizer) != self.header.probe:
            raise UserError(
                f"--prompts: {self.path} was made with another tokenizer than the model's: {AGAIN}"
            )

    def read(self, seeds: Sequence[int]) -> list[SeedPrompts]:
        """The prompts of some seeds, each checked against its hash.

        Raises:
            UserError: The file is truncated or was changed.
        """
        found: dict[int, SeedPrompts] = {}
        try:
            with gzip.open(self.path, "rb") as stream:
                stream.readline()
                for entry in self.header.seeds:
                    lines = list(islice(stream, entry.prompts))
                    if entry.seed not in seeds:
                        continue
                    if hashlib.sha256(b"".join(lines)).hexdigest() != entry.sha256:
                        raise self._damaged()
                    rows = [json.loads(line) for line in lines]
                    prompts = [Prompt(r["tokens"], r["record"], r["scoring"]) for r in rows]
                    found[entry.seed] = SeedPrompts(prompts, entry.max_new_tokens, entry.metrics)
        except (OSError, EOFError, zlib.error):
            raise self._damaged() from None
        return [found[seed] for seed in seeds]
