"""Calibrates a model on texts and builds a quantizer in one call, as the verbs do in two."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from kvquant.calibration.build import StatisticsInfo, build_quantizer
from kvquant.calibration.collect import calibrate_on
from kvquant.errors import UserError
from kvquant.fetch.hub import is_repository_id
from kvquant.fetch.model_manifest import ModelManifest
from kvquant.fetch.text_overlap import described_text
from kvquant.formats.files import is_text
from kvquant.formats.user_text import read_prose
from kvquant.models.base_model import check_tokenizer
from kvquant.models.generation import check_ids
from kvquant.models.loading import attention_layers, load_base_model, weights_sha256, with_manifest
from kvquant.models.logits_sample import logits_sample
from kvquant.models.placement import layer_devices
from kvquant.quantization.quantizer import Quantizer
from kvquant.runtime.console import loading
from kvquant.runtime.progress import on_terminal
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.config import digest
from kvquant.study.digests import VERSIONS
from kvquant.study.presets import PRESETS, headline_scheme, scheme_from
from kvquant.study.scheme_kinds import CalibratedScheme, Scheme
from kvquant.study.schemes import SchemeSpec

DEFAULT_WINDOW = 2048
MIN_WINDOW = 32
# Texts are read until they have this many times the tokens of all windows, so that the windows may
# be drawn from a stream of texts that never ends.
POOL = 8
BETWEEN = "\n\n"

Texts = str | Path | Iterable[str | Path]


def calibrate(
    model: str | Path | ModelManifest | nn.Module,
    tokenizer: Any = None,
    texts: Texts | None = None,
    bits: int | None = None,
    *,
    scheme: SchemeSpec | str | Mapping[str, Any] | None = None,
    windows: int = 16,
    window: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
) -> Quantizer:
    """Calibrates a model on texts and builds the quantizer of a scheme for it.

    The model reads random windows of the texts, one forward and one backward pass each, in bounded
    memory. Layers with a sliding window are left out, as caches keep their tokens in 16 bits. A
    model in memory is as before afterwards. On a terminal, the progress is shown on stderr.

    Args:
        model: Directory, hub id, manifest of a fetched model, or a loaded transformers model, on
            any device.
        tokenizer: The model's tokenizer; None: that of the folder, for a model that is not in
            memory.
        texts: Texts like those that the model will read: strings, or `pathlib.Path` of UTF-8 files.
            They are read in order, joined by blank lines, until they have 8 times the tokens that
            all windows have.
        bits: 4, 3 or 2 for allocated codes, whose full blocks take 4.4, 3.4 or 2.4 bits per element
            with everything in them; None: 3, unless `scheme` is given.
        scheme: Another scheme that needs calibration: a short name such as "nuq3-1pct"
            (:func:`kvquant.scheme_presets` lists them), options as in a study, or a scheme.
        windows: Number of windows.
        window: Tokens per window; None: 2048, or fewer where the model's positions or the texts
            have fewer.
        seed: Chooses where the windows begin.
        device: "cpu", "cuda" or "auto", for a model that is not in memory.
        dtype: Dtype of the weights, likewise; None: fp32 on a CPU, 16 bits on a GPU.
        device_map: Used instead of `device`, as in :func:`kvquant.load`.

    Returns:
        The quantizer, for `kvquant.load(model, quantizer=...)`.

    Raises:
        UserError: The texts are too short, or the model or the scheme is not supported; the message
            says why in one line.
        NonFinite: Losses, activations or gradients overflow in the model's dtype.
    """
    spec, name = _scheme(bits, scheme)
    options = _options(windows, window, seed, getattr(spec, "outliers", None))
    if texts is None:
        raise UserError("texts: are missing; give strings like those that the model will read")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    base: Any = model
    if isinstance(model, nn.Module):
        if device != "auto" or (dtype, device_map) != (None, None):
            raise UserError("model: is loaded; move or convert it before, not by options")
        if tokenizer is None:
            raise UserError("tokenizer: is missing, and a model in memory has none of its own")
        sha256 = None
    else:
        model = with_manifest(model)
        with loading(model):
            base, tokenizer = load_base_model(
                model, device=device, dtype=dtype, device_map=device_map, tokenizer=tokenizer
            )
            sha256 = weights_sha256(model)
    attention_layers(base)  # refuses unsupported models before the texts are read
    layer_devices(base)
    if any(parameter.is_inference() for parameter in base.parameters()):
        raise UserError(
            "model: was made in torch.inference_mode, so that no gradients reach its activations; "
            "make it outside"
        )
    text, ids = _read(tokenizer, texts, POOL * windows * (window or DEFAULT_WINDOW))
    check_ids(base, [ids])
    options = _fitted(options, window, int(base.config.max_position_embeddings), len(ids))
    with (
        torch.inference_mode(False),
        _frozen(base),
        on_terminal("calibrate", "windows") as progress,
    ):
        sample = logits_sample(base)
        found = calibrate_on(
            base,
            ids,
            options,
            spec.sampled_tokens,
            roped_keys=spec.keys_after_rope,
            report=lambda number, count, loss: progress(number, count),
        )
    described = described_text("texts", text)
    info = StatisticsInfo(
        weights_sha256=sha256,
        model_identity=model.identity if isinstance(model, ModelManifest) else None,
        text=described,
        spec_digest=digest(options, described.sha256, VERSIONS["calibrate"]),
        calibration=options,
        **{name: value for name, value in found.facts().items() if name != "calibration"},
    )
    manifest, tables = build_quantizer(
        found.layers,
        info,
        spec,
        model=model_name(model),
        scheme=name,
        spec_digest=digest(info.spec_digest, spec, VERSIONS["quantize"]),
    )
    return Quantizer(manifest.model_copy(update={"logits_sample": sample}), tables)


def model_name(model: Any) -> str:
    """Returns the name of a model: its hub id, or that of its folder or class, without the path."""
    if isinstance(model, ModelManifest):
        return model.model
    if isinstance(model, nn.Module):
        model = getattr(model, "name_or_path", "") or type(model).__name__
    given = str(model)
    of_hub = is_repository_id(given) and not Path(given).exists()
    return given if of_hub else Path(given).resolve().name


def _scheme(bits: int | None, scheme: Any) -> tuple[CalibratedScheme, str]:
    """Returns the scheme to calibrate for, and its name."""
    if scheme is None:
        spec: Scheme = headline_scheme(3 if bits is None else bits)
    elif bits is not None:
        raise UserError("bits: a scheme says its own; leave bits or scheme out")
    else:
        spec = scheme_from(scheme)
    names = (name for name, preset in PRESETS.items() if preset.scheme == spec)
    name = next(names, spec.kind)
    if not isinstance(spec, CalibratedScheme):
        raise UserError(
            f"scheme: '{name}' needs no calibration: use it by kvquant.load(model, scheme=...)"
        )
    return spec, name


def _options(
    windows: int, window: int | None, seed: int, outliers: float | None
) -> CalibrationSpec:
    """Returns the options of a calibration, whose window may still be too long."""
    usual = CalibrationSpec.model_fields["outlier_fractions"].default
    more = [outliers] if outliers is not None and outliers < 1 else []
    try:
        return CalibrationSpec(
            dataset="texts",
            windows=windows,
            window=DEFAULT_WINDOW if window is None else window,
            seed=seed,
            outlier_fractions=sorted({*usual, *more}),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or str(first.get("ctx", {}).get("field", ""))
        got = f" (got {first['input']!r})" if first["loc"] else ""  # else that of all options
        raise UserError(f"{where}: {first['msg']}{got}") from None


def _fitted(
    options: CalibrationSpec, window: int | None, positions: int, tokens: int
) -> CalibrationSpec:
    """Returns the options with a window that model and texts allow, if none was asked for.

    Raises:
        UserError: There is not even a short window.
    """
    short = "give longer texts"
    if window is None:
        length = min(DEFAULT_WINDOW, positions, tokens)
        if length < MIN_WINDOW:
            raise UserError(f"texts: have {tokens} tokens, fewer than {MIN_WINDOW}: {short}")
        options = options.model_copy(update={"window": length})
    elif window > positions:
        raise UserError(f"window: {window} exceeds the model's {positions} positions")
    elif window > tokens:
        raise UserError(f"window: {window} tokens, but the texts have only {tokens}: {short}")
    if tokens < options.windows * options.window:
        warnings.warn(
            f"texts: have {tokens:,} tokens for {options.windows} windows of {options.window:,}, "
            "which therefore overlap; a quantizer is better with more text",
            stacklevel=3,
        )
    return options


def _read(tokenizer: Any, texts: Texts, enough: int) -> tuple[str, list[int]]:
    """Returns the beginning of the joined texts, and its token ids.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        enough: Number of tokens after which no further text is read.
    """
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable | Path):
        raise UserError(f"texts: must be strings or paths, got {type(texts).__name__}")
    every = [texts] if isinstance(texts, str | Path) else texts
    parts: list[str] = []
    ids: list[int] = []
    for number, given in enumerate(every):
        if not isinstance(given, str | Path):
            raise UserError(f"texts: number {number} is no string but {type(given).__name__}")
        if isinstance(given, str) and os.path.isfile(given):
            raise UserError(f"texts: '{given}' is the name of a file; give it as pathlib.Path")
        text = read_prose(given, "texts") if isinstance(given, Path) else given
        if not is_text(text):
            raise UserError(f"texts: number {number} holds half of a surrogate pair")
        if parts:
            text = BETWEEN + text
        parts.append(text)
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= enough:
            break
    if ids and not any(part.strip() for part in parts):
        raise UserError("texts: hold nothing but white space; give texts like those to be read")
    return "".join(parts), ids


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode with frozen weights, and back at the end."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)
