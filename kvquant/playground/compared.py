"""The caches that `kvquant compare` runs: named, calibrated where need be, and loaded."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.formats.user_text import check_there
from kvquant.playground.options import DEFAULT_SCHEME
from kvquant.runtime.console import loading
from kvquant.study.asked_schemes import asked_scheme
from kvquant.study.scheme_kinds import Scheme
from kvquant.study.schemes import AllocatedScheme

BASELINE = "fp16"
DEFAULT = ("fp8", DEFAULT_SCHEME, "kivi-4")


@dataclass
class Compared:
    """One cache of a comparison.

    Attributes:
        name: The word of the command line that names it: a scheme, or a quantizer.
        scheme: The scheme.
        quantizer: Its quantizer, for a scheme that needs one.
        calibrated_here: Whether the quantizer was made for this comparison.
        title: The scheme's name for readers, different from those of the others.
        qm: The model with the scheme's caches, once it is loaded.
    """

    name: str
    scheme: Scheme
    quantizer: Any = None
    calibrated_here: bool = False
    title: str = ""
    qm: Any = None


def check_schemes(args: argparse.Namespace) -> dict[str, Scheme]:
    """Returns the schemes of --scheme by their words, before anything takes time.

    Raises:
        UserError: A word is unknown, or a scheme needs calibration and there is no text for it.
    """
    words = args.scheme or ([] if args.quantizer else DEFAULT)
    found = {word: asked_scheme(word) for word in dict.fromkeys(words)}
    calibrated = [word for word, scheme in found.items() if scheme.registration.calibrated]
    if calibrated and args.calibrate_on is None:
        raise UserError(
            f"--scheme: '{calibrated[0]}' needs calibration; give --calibrate-on FILE, or a "
            "--quantizer of kvquant calibrate in its place"
        )
    if not calibrated:
        for name in ("calibrate_on", "windows", "window"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: no --scheme here needs calibration; leave it out")
    for file in args.calibrate_on or []:
        check_there(file, "--calibrate-on")
    return found


def with_titles(caches: list[Compared]) -> list[Compared]:
    """Gives caches their names for readers, with the word that names them where two are equal."""
    titles = [cache.scheme.title(cache.name) for cache in caches]
    count = Counter(titles)
    for cache, title in zip(caches, titles, strict=True):
        cache.title = title if count[title] == 1 else f"{title} ({cache.name})"
    return caches


def load_compared(args: argparse.Namespace, schemes: dict[str, Scheme]) -> list[Compared]:
    """Loads the model once, calibrates what needs it, and returns all caches, fp16's first.

    Allocated codes get a model of their own from the same files, as the rotation of values is
    folded into its weights; the weights are then in memory twice.

    Args:
        args: The options of `kvquant compare`.
        schemes: What :func:`check_schemes` returned.

    Raises:
        UserError: The model is not supported, or a quantizer or scheme does not fit it.
    """
    from kvquant.models.loading import load, load_base_model, weights_sha256, with_manifest
    from kvquant.models.prompt_attention import with_prompt_attention
    from kvquant.quantization.quantizer import load_quantizer
    from kvquant.quantization.quantizer_file import check_weights

    model = asked_model(args.model)
    fp16 = asked_scheme(BASELINE)
    caches = [Compared(BASELINE, fp16)]
    for source in dict.fromkeys(args.quantizer):
        quantizer = load_quantizer(source)
        caches.append(Compared(source, quantizer.scheme, quantizer))
    caches += [Compared(word, scheme) for word, scheme in schemes.items()]
    for cache in caches[1:]:
        cache.scheme = with_prompt_attention(cache.scheme, args.prompt_attention)
    caches = [cache for cache in caches if cache is caches[0] or cache.scheme != fp16]
    if len(caches) == 1:
        raise UserError("--scheme: fp16 is what others are compared with; name another")
    with loading(model):
        base, tokenizer = load_base_model(model, device=args.device)
        sha256 = weights_sha256(with_manifest(model))
    for cache in caches:
        if cache.quantizer is not None:
            check_weights(cache.quantizer.source, cache.quantizer.manifest, sha256)
        elif cache.scheme.registration.calibrated:
            cache.quantizer = _calibrated(args, base, tokenizer, cache.scheme)
            cache.calibrated_here = True
    rotated: Any = None  # the model with the rotation in its weights
    for cache in caches:
        given: dict[str, Any] = {"quantizer": cache.quantizer, "tokenizer": tokenizer}
        given["prompt_attention"] = cache.scheme.prompt_attention
        scheme = None if cache.quantizer is not None else cache.scheme
        if not isinstance(cache.scheme, AllocatedScheme) or not cache.scheme.rotation:
            cache.qm = load(base, scheme, **given)
        elif rotated is not None:
            cache.qm = load(rotated, scheme, **given)
        else:
            with loading(model):
                cache.qm = load(model, scheme, device=args.device, **given)
            rotated = cache.qm.model
    return with_titles(caches)


def _calibrated(args: argparse.Namespace, base: Any, tokenizer: Any, scheme: Scheme) -> Any:
    """Returns a quantizer of a scheme, made from the texts of --calibrate-on."""
    from kvquant.calibration.from_texts import calibrate

    more = {"windows": args.windows, "window": args.window}
    given = {name: value for name, value in more.items() if value is not None}
    return calibrate(base, tokenizer, args.calibrate_on, scheme=scheme, **given)
