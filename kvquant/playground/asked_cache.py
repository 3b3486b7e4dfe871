"""Loads a model with the cache that a command line asks for."""

from __future__ import annotations

import argparse
import math
from typing import Any

from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.playground.options import DEFAULT_SCHEME
from kvquant.runtime.console import loading
from kvquant.study.asked_schemes import asked_scheme
from kvquant.study.scheme_kinds import Scheme


def asked_cache(args: argparse.Namespace) -> Scheme | None:
    """Returns the scheme that --scheme names, None for that of the quantizer, before any work.

    Raises:
        UserError: A scheme needs calibration and has no quantizer, or there are both.
    """
    if args.quantizer is not None:
        if args.scheme is not None:
            raise UserError("--scheme: the quantizer says its own; leave --scheme or it out")
        return None
    name = args.scheme or DEFAULT_SCHEME
    scheme = asked_scheme(name)
    if scheme.registration.calibrated:
        raise UserError(
            f"--scheme: '{name}' needs calibration; make a quantizer by kvquant calibrate "
            f"--model {args.model} --text FILE --scheme {name} --out FOLDER, and give --quantizer"
        )
    return scheme


def load_asked(args: argparse.Namespace, scheme: Scheme | None) -> Any:
    """Returns the `QuantizedModel` of the options that say what is loaded, and how.

    Args:
        args: The options.
        scheme: What :func:`asked_cache` returned.

    Raises:
        UserError: The model is not supported, or the quantizer does not fit it.
    """
    from kvquant.models.loading import load

    model = asked_model(args.model)
    with loading(model):
        return load(
            model,
            scheme,
            quantizer=args.quantizer,
            device=args.device,
            prompt_attention=args.prompt_attention,
        )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of sampling that are given, by their names in transformers.

    Raises:
        UserError: One is out of its range.
    """
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    found = {name: value for name, value in given.items() if value is not None}
    if not 0 <= found.get("temperature", 0) < math.inf:
        raise UserError(f"--temperature: {args.temperature:g} is no temperature; 0 is greedy")
    if not 0 < found.get("top_p", 1) <= 1:
        raise UserError(f"--top-p: {args.top_p:g} is not above 0 and at most 1")
    check_number("--top-k", found.get("top_k", 1))
    if found.get("temperature") == 0:  # greedy, as elsewhere
        if len(found) > 1:
            raise UserError("--temperature: 0 means greedy answers; leave --top-p and --top-k out")
        return {}
    return found


def check_number(option: str, number: int, least: int = 1) -> None:
    """Refuses a number below the least one.

    Raises:
        UserError: It is.
    """
    if number < least:
        raise UserError(f"{option}: {number} is less than {least}")
