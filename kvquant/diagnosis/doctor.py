"""`kvquant doctor`: what this machine can run, and for a model which kernels it would get."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvquant import __version__
from kvquant.diagnosis.checks import Check, first_line
from kvquant.diagnosis.gpu_checks import Probe
from kvquant.diagnosis.software import (
    data_checks,
    hub_check,
    optional_checks,
    software_checks,
)
from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.formats.files import expand_home
from kvquant.study.asked_schemes import asked_scheme, one_of_each_kind

if TYPE_CHECKING:
    from kvquant.diagnosis.kernel_table import SchemeKernels
    from kvquant.diagnosis.model_facts import ModelFacts

SCHEMA = 1  # of the JSON


def _data_folder(given: Path | None) -> Path | None:
    """Returns the folder of local data that was given, or that the environment names.

    Raises:
        UserError: The given one does not exist.
    """
    if given is None:
        named = os.environ.get("KVQUANT_DATA_DIR")
        return expand_home(named, "KVQUANT_DATA_DIR") if named else None
    folder = expand_home(str(given), "--data-dir")
    if not folder.is_dir():
        raise UserError(f"--data-dir: no such folder: {folder}")
    return folder


def _check_words(args: argparse.Namespace) -> None:
    """Refuses wrong options before anything takes time.

    Raises:
        UserError: Names the option.
    """
    if args.scheme is not None:
        asked_scheme(args.scheme)
        if args.model is None:
            raise UserError("--scheme: which kernels it gets depends on the model; give --model")
    if args.model is not None:
        asked_model(args.model)


def _read(model: str) -> tuple[ModelFacts | None, Check | None]:
    """Returns what a model's configuration says, or the check that says why nothing is known.

    Raises:
        UserError: The configuration cannot be read.
    """
    try:
        from transformers.utils import logging

        from kvquant.diagnosis.model_facts import read_model

        logging.set_verbosity_error()
        return read_model(asked_model(model)), None
    except UserError:
        raise
    except Exception as error:  # of a broken torch or transformers, of any type
        fix = "see the rows of torch and transformers"
        return None, Check("model", model, "missing", first_line(error), fix, needed=True)


def _short(reason: str) -> tuple[str, str]:
    """Returns a refusal without its list of families, and the fix."""
    told = reason.removeprefix("model: ").partition(";")[0]
    return told, "use a cache of transformers, or a model of docs/model-features.md"


def model_checks(model: ModelFacts) -> list[Check]:
    """Returns the rows of a model: family and kinds of layers."""
    from kvquant.diagnosis.model_facts import LayerGroup

    def row(name: str, found: str) -> Check:
        return Check("model", name, "ok", found)

    def group(found: LayerGroup) -> Check:
        many = len(found.layers)
        count = "1 layer" if many == 1 else f"{many} layers"
        if found.kind == "full":
            return row("full attention", f"{count}, quantized")
        if found.kind == "sliding":
            return row("sliding window", f"{count} of {found.window:,} tokens, kept in 16 bits")
        told, fix = _short(found.problem)
        return Check("model", "refused", "missing", f"{count}: {told}", fix, needed=True)

    if model.family is not None:
        rows = [row("family", f"{model.family} ({model.model_type})")]
    else:
        rows = [Check("model", "family", "missing", f"{model.model_type}: none of ours")]
    rows += [group(one) for one in model.groups]
    if model.refused is not None and not any(one.kind == "refused" for one in model.groups):
        told, fix = _short(model.refused)
        rows.append(Check("model", "refused", "missing", told, fix, needed=True))
    if (cache := model.cache) is not None:
        shape = f"{cache.heads} query heads, {cache.kv_heads} kv heads of {cache.head_dim} channels"
        rows.append(row("shape", f"{shape}, up to {cache.positions:,} tokens"))
        if not cache.full_layers:
            told = "every layer has a sliding window, which stays in 16 bits"
            rows.append(Check("model", "quantized", "warning", told, "nothing is quantized"))
    return rows


def _kernels(
    model: ModelFacts, scheme: str | None, on_gpu: bool
) -> tuple[list[SchemeKernels], list[Check]]:
    """Returns the kernels of the asked scheme, or of one of every kind, and what went wrong."""
    import torch

    from kvquant.diagnosis.kernel_table import prompt_check, scheme_kernels
    from kvquant.diagnosis.weights import DTYPES, weight_dtype

    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = DTYPES[weight_dtype(model, "auto")] if on_gpu else torch.float32
    schemes = one_of_each_kind() if scheme is None else {scheme: asked_scheme(scheme)}
    rows, checks = [], [prompt_check(model, dtype, device)]
    assert model.cache is not None
    for name, spec in schemes.items():
        try:
            found = scheme_kernels(
                name,
                spec,
                model.cache,
                dtype=dtype,
                device=device,
                quantized_weights=model.stored is not None,
            )
        except UserError:
            raise
        except Exception as error:  # a peer's package that does not work ends no other row
            told = first_line(error)
            checks.append(Check("kernels", name, "missing", told, needed=scheme is not None))
            continue
        rows.append(found)
        if scheme is not None and found.state == "missing":
            told, _, fix = (found.problem or "no backend takes it").partition(";")
            checks.append(Check("kernels", name, "missing", told, fix.strip(), needed=True))
    return rows, checks


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Makes all checks and returns what is printed, as the JSON has it.

    Raises:
        UserError: An option is wrong, or the model's configuration cannot be read.
    """
    _check_words(args)
    folder = _data_folder(args.data_dir)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    probe = Probe()
    try:
        checks = list(software_checks())
        rest = [*optional_checks(), hub_check(args.offline), *data_checks(folder)]
        model, broken = (None, None) if args.model is None else _read(args.model)
        probed = probe.checks()
    except BaseException:
        probe.stop()
        raise
    checks += [check for check in probed if check.section == "software"]
    checks += [check for check in probed if check.section != "software"]
    checks += rest
    on_gpu = any(check.name == "GPU" and check.state == "ok" for check in probed)
    kernels: list[SchemeKernels] = []
    if broken is not None:
        checks.append(broken)
    if model is not None:
        checks += model_checks(model)
        if model.cache is not None and model.cache.full_layers:
            kernels, more = _kernels(model, args.scheme, on_gpu)
            checks += more
    fails = [check for check in checks if check.fails]
    return {
        "schema": SCHEMA,
        "kvquant": __version__,
        "status": 1 if fails else 0,
        "device": "cuda" if on_gpu else "cpu",
        "checks": [check.as_json() for check in checks],
        "model": None if model is None else _model_json(model),
        "kernels": [row.as_json() for row in kernels],
    }


def _model_json(model: ModelFacts) -> dict[str, Any]:
    return {
        "name": model.name,
        "model_type": model.model_type,
        "family": model.family,
        "refused": model.refused,
        "parameters": model.parameters,
        "layers": [
            {
                "kind": group.kind,
                "layers": list(group.layers),
                "window": group.window,
                "problem": group.problem,
            }
            for group in model.groups
        ],
    }


def run(args: argparse.Namespace) -> int:
    """Runs `kvquant doctor`; returns 1 if what was asked for cannot run here."""
    if args.json:
        from kvquant.diagnosis.screen import json_out

        found = examine(args)
        json_out(json.dumps(found, indent=2))
        return int(found["status"])
    from kvquant.diagnosis.doctor_screen import show
    from kvquant.diagnosis.screen import Screen
    from kvquant.runtime.console import waiting

    with waiting("looking at this machine"):
        found = examine(args)
    show(found, Screen())
    return int(found["status"])
