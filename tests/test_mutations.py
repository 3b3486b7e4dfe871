"""Random damage to every kind of file of a finished study: named, or without any effect.

A mutation is one changed field of a JSON file (an edit by hand) or one flipped bit of any file.
What reads the file must refuse it in one line with the file's name, or give exactly what it gave
before (a blank that became a tab).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kvquant.analysis.collect import collect
from kvquant.analysis.tables import read_table, write_table
from kvquant.calibration.build import build_layer
from kvquant.calibration.collect import calibrate
from kvquant.calibration.statistics import load_statistics, save_statistics
from kvquant.errors import UserError
from kvquant.evaluation import seed_files
from kvquant.evaluation.generated import Prompt, SeedPrompts
from kvquant.evaluation.prompt_file import PromptFile, write_prompts
from kvquant.fetch.model import fetch_model
from kvquant.fetch.model_manifest import study_manifest, verify_model
from kvquant.formats.files import sha256_text
from kvquant.quantization.quantizer_file import load_quantizer
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.config import Study
from kvquant.study.digests import eval_digest
from kvquant.study.schemes import NuqScheme
from tests.support.models import save_tiny, tiny_model
from tests.support.mutations import mutated
from tests.support.quantizers import save_made_quantizer
from tests.support.studies import DEVICE, study_of, write_study

MUTATIONS = 100  # of each kind of file


class Kind(NamedTuple):
    """A kind of file: which there are, what reading all of them gives, how large a sample."""

    files: list[Path]
    read: Callable[[], str]


def small_study() -> Study:
    """Two schemes, one seed; every suite and measurement."""
    schemes = {"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3}}
    return study_of(seeds=[0], schemes=schemes)


def files_below(folder: Path, *patterns: str) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.rglob(pattern))


def records_kind(folder: Path) -> Kind:
    study = small_study()
    write_study(study, folder / "results")

    def read() -> str:
        tables = collect(study, folder / "results", DEVICE)
        return "".join(table.to_csv() for table in tables.values())

    found = files_below(folder / "results", "*.json", "*.jsonl")
    return Kind([file for file in found if file.name != "study.json"], read)


def resume_kind(folder: Path) -> Kind:
    study = small_study()
    write_study(study, folder / "results")
    place = folder / "results/eval/tiny/nuq3/passkey/seed0"
    digest = eval_digest(study, "tiny", "nuq3", "passkey", 0)

    def read() -> str:
        found = seed_files.read_pair(place, digest, "0" * 64)
        assert found is not None
        return found[0].model_dump_json() + found[1]

    return Kind(files_below(place, "*.json*"), read)


def tables_kind(folder: Path) -> Kind:
    study = small_study()
    write_study(study, folder / "results")
    tables = collect(study, folder / "results", DEVICE)
    for name, table in tables.items():
        write_table(table, folder / "tables" / f"{name}.parquet")

    def read() -> str:
        return "".join(read_table(folder / "tables", name).to_csv() for name in tables)

    return Kind(files_below(folder / "tables", "*.parquet", "*.csv"), read)


def prompts_kind(folder: Path) -> Kind:
    file = folder / "prompts.jsonl.gz"
    seeds = {
        seed: SeedPrompts(
            [Prompt([seed, 5, at], {"key": at, "depth": 0.5}, {"all": None}) for at in range(4)], 10
        )
        for seed in (0, 1)
    }
    write_prompts(
        file, seeds, spec_digest="1" * 16, spec={"length": 200}, data_sha256=None, packages={},
        probe=[1, 2],
    )  # fmt: skip

    def read() -> str:
        found = PromptFile(file, "1" * 16, [0, 1])
        return f"{found.header} {found.read([0, 1])} {found.sha256(0)}"

    return Kind([file], read)


def quantizer_kind(folder: Path) -> Kind:
    spec = CalibrationSpec(windows=1, window=64)
    found = calibrate(tiny_model(), [list(range(64))], spec)
    info = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
    save_statistics(folder / "stats.safetensors", found, info)
    scheme = NuqScheme(kind="nuq", bits=3)
    layers = [build_layer(s, scheme, spec.outlier_fractions, 2)[0] for s in found]
    save_made_quantizer(folder / "quantizer.json", scheme, "a" * 64, layers)

    def read() -> str:
        layers, facts = load_statistics(folder / "stats.safetensors")
        manifest, tables = load_quantizer(folder / "quantizer.json", weights_sha256="a" * 64)
        parts = [*(vars(layer) for layer in layers), *(vars(table) for table in tables)]
        held = [t for part in parts for t in part.values() if isinstance(t, torch.Tensor)]
        return f"{facts} {manifest} " + " ".join(sha256_text(str(t.tolist())) for t in held)

    return Kind(files_below(folder, "*.json", "*.safetensors"), read)


def model_kind(folder: Path) -> Kind:
    model = save_tiny(folder / "model")
    manifest = folder / "manifest.json"
    study = study_of(models={"tiny": {"source": "local", "path": str(model)}})
    fetch_model("tiny", study.model("tiny"), manifest)

    def read() -> str:
        for kept in model.glob(".*"):  # hashes remembered by times, which a test is too fast for
            kept.unlink()
        found = study_manifest(manifest, study, "tiny")
        verify_model(found)
        return f"{found.identity} {found.weights_sha256} {found.directory}"

    return Kind([manifest, *files_below(model, "*.json", "*.safetensors")], read)


KINDS = {
    "records": records_kind,
    "resume": resume_kind,
    "tables": tables_kind,
    "prompts": prompts_kind,
    "quantizer": quantizer_kind,
    "model": model_kind,
}


def named(file: Path, told: str) -> bool:
    """Whether a message names a file, or the one that vouches for it, and nothing else."""
    lines = told.splitlines()
    if file.name in ("run.json", "samples.jsonl"):
        return len(lines) == 1 and str(file.parent) in told
    return len(lines) == 1 and (file.stem.split(".")[0] in told or "--model-manifest" in told)


@pytest.mark.fault(
    "records",
    "100 random changes of a field or a bit, for each kind of file of a finished study",
    "none is accepted silently",
)
@pytest.mark.parametrize("name", KINDS)
def test_no_mutation_is_accepted_silently(name: str, tmp_path: Path) -> None:
    kind = KINDS[name](tmp_path)
    rng = random.Random(name)
    before = kind.read()
    assert kind.read() == before
    refused = 0
    for number in range(MUTATIONS):
        file = rng.choice(kind.files)
        good, damaged = file.read_bytes(), mutated(file, rng)
        file.write_bytes(damaged)
        try:
            assert kind.read() == before, f"mutation {number} of {file} was accepted"
        except UserError as error:
            refused += 1
            assert named(file, str(error)), f"{file}: {error}"
        file.write_bytes(good)
    assert refused > MUTATIONS * 0.8
    assert kind.read() == before


@pytest.mark.fault(
    "records",
    "two files exchanged",
    "refused by name",
)
def test_files_are_not_exchanged(tmp_path: Path) -> None:
    """A whole file in the place of another of its kind."""
    study = study_of(seeds=[0, 1])
    results = tmp_path / "results"
    write_study(study, results)
    rng = random.Random(0)
    for folder in ("eval", "perf", "energy", "append"):
        files = files_below(results / folder, "*.json*")
        for _ in range(6):
            one, two = rng.sample(files, 2)
            if one.suffix == two.suffix:
                good = one.read_bytes()
                shutil.copy(two, one)
                with pytest.raises(UserError, match=one.name.split(".")[0]):
                    collect(study, results, DEVICE)
                one.write_bytes(good)
    collect(study, results, DEVICE)
