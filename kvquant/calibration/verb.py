"""`kvquant calibrate`: builds a quantizer from texts, or collects the statistics of a study."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.formats.files import expand_home
from kvquant.formats.user_text import check_there
from kvquant.runtime.console import terse
from kvquant.study.asked_schemes import asked_scheme
from kvquant.study.presets import HEADLINE_BITS, headline_scheme
from kvquant.study.scheme_kinds import CalibratedScheme

# What a field is about in the other way, and what to do instead.
OF_TEXTS = {
    "text": "a study names its own texts",
    "bits": "a study names its own schemes",
    "scheme": "a study names its own schemes",
    "windows": "a study says so in `calibration`",
    "window": "a study says so in `calibration`",
    "seed": "a study says so in `calibration`",
}
OF_STUDY = ("model_manifest", "data_manifest", "calibration")
NEEDED_BY_TEXTS = {
    "model": "the folder or hub id of the model",
    "text": "files like those that the model will read (or --study for a study's statistics)",
    "out": "the folder of the quantizer",
}
NEEDED_BY_STUDY = {
    "model": "the name of the model in the study",
    "model_manifest": "the manifest.json of fetch-model (or leave --study out)",
    "data_manifest": "the manifest.json of fetch-data (or leave --study out)",
    "out": "the file of the statistics, stats.safetensors",
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_way(args: argparse.Namespace) -> None:
    """Refuses options of both ways together, and missing ones of the way that is meant.

    Raises:
        UserError: One line names the option and the fix.
    """
    if args.study is not None:
        for name, told in OF_TEXTS.items():
            if getattr(args, name) is not None:
                raise UserError(f"{_option(name)}: {told}; leave it or --study out")
    else:
        for name in OF_STUDY:
            if getattr(args, name) is not None:
                raise UserError(
                    f"{_option(name)}: belongs to a study; give --study, or leave it out"
                )
    needed = NEEDED_BY_TEXTS if args.study is None else NEEDED_BY_STUDY
    for name, what in needed.items():
        if getattr(args, name) is None:
            raise UserError(f"{_option(name)}: is missing; give {what}")


def scheme_to_calibrate(scheme: str | None, bits: int | None) -> CalibratedScheme:
    """Returns the scheme that --scheme or --bits ask for.

    Raises:
        UserError: Both are given, a word is unknown, or the scheme needs no calibration.
    """
    if bits is not None and bits not in HEADLINE_BITS:
        raise UserError(f"--bits: {bits} is none of 4, 3 and 2; give another scheme by --scheme")
    if scheme is None:
        found: Any = headline_scheme(bits or 3)
    elif bits is not None:
        raise UserError("--bits: a scheme says its own; leave --bits or --scheme out")
    else:
        found = asked_scheme(scheme)
    if not isinstance(found, CalibratedScheme):
        raise UserError(
            f"--scheme: '{scheme}' needs no calibration; use it at once, by kvquant generate "
            f"--scheme {scheme}"
        )
    return found


def new_folder(given: Path) -> Path:
    """Returns the folder of a new quantizer, before anything takes time.

    Raises:
        UserError: A file, a model or another quantizer is there, or it is named like a file.
    """
    folder = expand_home(str(given), "--out")
    if folder.suffix in (".json", ".safetensors") or folder.is_file():
        raise UserError(f"--out: {folder} names a file; without --study it is a quantizer's folder")
    # Made at the end, so that a calibration that fails leaves no folder behind.
    above = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out: {folder}: {above} is no folder that can be written")
    if (folder / "config.json").exists():
        raise UserError(f"--out: {folder} is a model's folder; choose another")
    if (folder / "quantizer.json").exists():
        raise UserError(f"--out: {folder} holds a quantizer; delete it, or choose another folder")
    return folder


def _from_texts(args: argparse.Namespace) -> None:
    scheme = scheme_to_calibrate(args.scheme, args.bits)
    model, folder = asked_model(args.model), new_folder(args.out)
    for file in args.text:
        check_there(file, "--text")
    with terse():
        from kvquant.calibration.from_texts import calibrate

        start = time.monotonic()
        more = {name: getattr(args, name) for name in ("windows", "window", "seed")}
        made = calibrate(
            model,
            texts=args.text,
            scheme=scheme,
            device=args.device,
            **{name: value for name, value in more.items() if value is not None},
        )
        made.save(folder)
    used = made.manifest.calibration
    print(
        f"{made.scheme.title(made.manifest.scheme)} for {made.model}: "
        f"{len(made.layers)} layers, {used['windows']} windows of {used['window']:,} tokens, "
        f"{time.monotonic() - start:.0f} s"
    )
    print(f"{folder}: quantizer.json, quantizer.safetensors, README.md")
    print(
        f'try it: kvquant generate --model {args.model} --quantizer {folder} --prompt "The sky is"'
    )


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant calibrate`."""
    check_way(args)
    if args.study is None:
        _from_texts(args)
        return
    from kvquant.calibration.collect import run as collect

    collect(args)
