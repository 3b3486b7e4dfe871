"""The file of a task's prompts, made once per model and read by the evaluation of every scheme.

It is gzipped JSON Lines. The first line, a sealed :class:`Header`, describes the prompts and holds
a hash of each seed's prompts. Each further line is one prompt with its seed, index, tokens and the
data that its answer is scored with. Equal prompts give equal bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from kvquant.errors import UserError, printable
from kvquant.evaluation.base import encode
from kvquant.evaluation.generated import Prompt, SeedPrompts
from kvquant.formats.files import parse_json, read_bytes, write_new
from kvquant.formats.sealing import check_seal, seal_of
from kvquant.study.record_types import Strict

SCHEMA_VERSION = 2
AGAIN = "make it with `kvquant prompts`"
# Tokenizers that differ for words, digits, blanks or accents differ for this text.
PROBE = "The pass key is 40718. Zürich\n\n  x = [1, 22];\tLe 3ème été naïf"


class SeedHeader(Strict):
    """Describes the prompts of one seed: number of lines, their hash and the seed's metrics."""

    seed: int = Field(ge=0)
    prompts: int = Field(ge=1)
    sha256: str
    max_new_tokens: int = Field(ge=1)
    metrics: dict[str, float]


class Header(Strict):
    """Describes the origin of the prompts, in which `probe` is :data:`PROBE` in tokens."""

    kind: Literal["prompts"] = "prompts"
    schema_version: Literal[2] = 2
    spec_digest: str
    spec: dict[str, Any]
    data_sha256: str | None
    packages: dict[str, str]
    probe: list[int]
    seeds: list[SeedHeader]
    seal: str = Field("", description="hash of all other fields (kvquant.formats.sealing)")


class _Line(Strict):
    """Holds the line of one prompt."""

    seed: int
    index: int
    tokens: list[int] = Field(min_length=1)
    record: dict[str, Any]
    scoring: dict[str, Any]


def probe(tokenizer: Any) -> list[int]:
    """Returns the tokens of :data:`PROBE`, by which tokenizers are told apart."""
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
    """Writes the prompts of all seeds in the order of the seeds.

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
    facts = header.model_dump(mode="json", exclude={"seal"})
    content = b"".join([_line(facts | {"seal": seal_of(facts)}).encode(), *blocks])
    write_new(path, gzip.compress(content, compresslevel=6, mtime=0))
    return header


class PromptFile:
    """Reads a file of prompts after checking its header."""

    def __init__(self, path: str | Path, spec_digest: str, seeds: Sequence[int]) -> None:
        """Reads the header.

        Args:
            path: Path of the file.
            spec_digest: Digest of the expected specification.
            seeds: Seeds that the file must contain.

        Raises:
            UserError: The file is missing, damaged, of another specification, or lacks a seed.
        """
        self.path = Path(path)
        if not self.path.exists() and not self.path.is_symlink():
            raise UserError(f"--prompts: no such file: {self.path}: {AGAIN}")
        raw = read_bytes(self.path, "--prompts", AGAIN)
        try:
            # Decompressing everything checks gzip's own sum and that nothing follows.
            first, *lines = gzip.decompress(raw).splitlines(keepends=True)
            head = parse_json(first.decode("utf-8"))
            if isinstance(head, dict) and head.get("schema_version") == 1:
                raise UserError(
                    f"--prompts: {self.path} was made before files of prompts were sealed: delete "
                    f"it by name and {AGAIN}"
                )
            self.header = Header.model_validate(head)
            check_seal(head)
            self._lines = self._shares(lines)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise self._damaged(error) from None
        if self.header.spec_digest != spec_digest:
            raise UserError(
                f"--prompts: {self.path} holds the prompts of another specification (digest "
                f"{printable(self.header.spec_digest)}, expected {spec_digest}): {AGAIN}"
            )
        self._seeds = {entry.seed: entry for entry in self.header.seeds}
        if lacking := [str(seed) for seed in seeds if seed not in self._seeds]:
            raise UserError(
                f"--prompts: {self.path} holds no prompts of seed {', '.join(lacking)}, only of "
                f"{', '.join(map(str, self._seeds))}: {AGAIN}"
            )

    def _damaged(self, error: Exception) -> UserError:
        what = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"field '{'.'.join(map(str, first['loc']))}': {first['msg']}"
        return UserError(
            f"--prompts: {self.path} is damaged: delete it by name and {AGAIN} ({what})"
        )

    def _shares(self, lines: list[bytes]) -> dict[int, list[bytes]]:
        """Returns the lines of each seed after checking their hashes and that no others exist.

        Raises:
            ValueError: A check fails.
        """
        shares: dict[int, list[bytes]] = {}
        at = 0
        for entry in self.header.seeds:
            share = lines[at : at + entry.prompts]
            at += entry.prompts
            if hashlib.sha256(b"".join(share)).hexdigest() != entry.sha256:
                raise ValueError(f"the prompts of seed {entry.seed} do not match their hash")
            if entry.seed in shares:
                raise ValueError(f"seed {entry.seed} is given twice")
            shares[entry.seed] = share
        if at != len(lines):
            raise ValueError("more prompts than the first line says")
        return shares

    def sha256(self, seed: int) -> str:
        """Returns the hash of a seed's prompts."""
        return self._seeds[seed].sha256

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses prompts that another tokenizer encoded.

        Raises:
            UserError: The tokenizer encodes :data:`PROBE` differently.
        """
        if probe(tokenizer) != self.header.probe:
            raise UserError(
                f"--prompts: {self.path} was made with another tokenizer than the model's: {AGAIN}"
            )

    def read(self, seeds: Sequence[int]) -> list[SeedPrompts]:
        """Returns the prompts of some seeds.

        Raises:
            UserError: A line is not a prompt of its seed.
        """
        return [self._seed(self._seeds[seed]) for seed in seeds]

    def _seed(self, entry: SeedHeader) -> SeedPrompts:
        prompts = []
        try:
            for index, line in enumerate(self._lines[entry.seed]):
                row = parse_json(line.decode("utf-8"))
                found = _Line.model_validate(row)
                if (found.seed, found.index) != (entry.seed, index):
                    raise ValueError(f"prompt {index} of seed {entry.seed} has another place")
                prompts.append(Prompt(row["tokens"], row["record"], row["scoring"]))
        except ValueError as error:
            raise self._damaged(error) from None
        return SeedPrompts(prompts, entry.max_new_tokens, entry.metrics)
