"""Reads the options of the lm-eval model as lm-eval's own `hf` does, or refuses them by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from pydantic import TypeAdapter, ValidationError

from kvquant.errors import UserError, unknown
from kvquant.quantization.quantizer_file import read_quantizer, scheme_of
from kvquant.study.config import load_study
from kvquant.study.schemes import SchemeSpec

MAX_BATCH_SIZE = 64  # lm-eval's default for batch_size=auto
DEFAULT_NEW_TOKENS = 256
GREEDY_ONLY = "do_sample: answers are greedy: leave do_sample and temperature out"
# Options of `hf` that change results and that this model lacks, with the values (the defaults of
# `hf`) at which they have no effect.
NOT_OURS: dict[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "revision": ("main",),
    "subfolder": ("",),
    "mixed_precision_dtype": (None,),
    "trust_remote_code": (False, None),
    "parallelize": (False, None),
    "max_memory_per_gpu": (None,),
    "max_cpu_memory": (None,),
    "offload_folder": (None, "./offload"),
    "tp_plan": (None,),
    "peft": (None,),
    "delta": (None,),
    "autogptq": (False, None),
    "gptqmodel": (False, None),
    "gguf_file": (None,),
}
# Options that do not affect a greedy answer, and values at which options have no effect.
WITHOUT_EFFECT = ("top_p", "top_k", "min_p", "typical_p", "use_cache", "pad_token_id")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def refuse_unknown(options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuses options that the model does not have.

    Raises:
        UserError: There is such an option; the message names the first.
    """
    for name, value in options.items():
        if name not in NOT_OURS:
            raise unknown("model option", name, (*known, *NOT_OURS))
        if value not in NOT_OURS[name]:
            raise UserError(
                f"{name}: the model kvquant has no such option of lm-eval's hf (got {value!r}): "
                "leave it out"
            )


def find_scheme(scheme: str | None, quantizer: str | None, study: str | None) -> SchemeSpec:
    """Returns a scheme by its name in a study file or quantizer.json, or as `fp16`, `kivi-BITS`.

    Raises:
        UserError: The name is unknown, or the scheme needs a quantizer and has none.
    """
    if scheme is None and quantizer is None:
        scheme = "fp16"
    if study is not None and scheme is not None:
        found: SchemeSpec = load_study(study).scheme(scheme)
    elif quantizer is not None:
        built = read_quantizer(Path(quantizer))
        if scheme not in (None, built.scheme):
            raise UserError(f"scheme: '{scheme}', but {quantizer} is for '{built.scheme}'")
        found = scheme_of(Path(quantizer), built)
    else:
        assert scheme is not None
        kind, _, bits = scheme.partition("-")
        raw = {"kind": kind, "bits": int(bits)} if bits.isdigit() else {"kind": kind}
        try:
            found = TypeAdapter(SchemeSpec).validate_python(raw)
        except ValidationError:
            raise UserError(
                f"scheme: '{scheme}' is unknown: give study=FILE or quantizer=FILE"
            ) from None
    if found.registration.calibrated and quantizer is None:
        raise UserError(f"quantizer: scheme '{scheme}' needs quantizer=FILE")
    return found


def read_batch_size(batch_size: int | str | None, max_batch_size: int | None) -> int:
    """Returns the batch size, which for "auto" is the largest and is halved out of memory.

    Raises:
        UserError: The option is neither a positive number nor "auto" or "auto:N".
    """
    text = str(1 if batch_size is None else batch_size)
    name, _, schedule = text.partition(":")
    if name == "auto" and (":" not in text or schedule.replace(".", "", 1).isdigit()):
        return int(max_batch_size or MAX_BATCH_SIZE)
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"batch_size: must be a positive number or auto (got '{batch_size}')")
    return int(text)


def read_dtype(name: str, value: str | torch.dtype | None) -> torch.dtype | None:
    """Returns a torch dtype by its name.

    Raises:
        UserError: torch has no such floating-point dtype.
    """
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if found is None and value is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"{name}: must be float32, bfloat16, float16 or auto (got '{value}')")
    return found


def checkpoint_dtype(pretrained: str | Path) -> torch.dtype | None:
    """Returns the dtype in a checkpoint's configuration, or None."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(pretrained), trust_remote_code=False)
    return read_dtype("dtype", getattr(config, "dtype", None))


def read_tokenizer(source: Any, options: dict[str, Any]) -> Any:
    """Loads a tokenizer by its name, or returns the object that was given."""
    if not isinstance(source, str | Path):
        return source
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, **options)


def read_mapping(name: str, value: Any) -> dict[str, Any]:
    """Returns an option that is a mapping or a JSON object.

    Raises:
        UserError: The option is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f"{name}: must be a JSON object (got '{value}')") from None
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name}: must be a mapping (got {value!r})")
    return dict(value or {})


class AnswerOptions(NamedTuple):
    """Holds the options of generated answers.

    Attributes:
        new_tokens: Length of the longest answer in tokens.
        stops: Texts that end an answer.
    """

    new_tokens: int
    stops: tuple[str, ...]


def read_answer_options(options: Mapping[str, Any], end: str | None) -> AnswerOptions:
    """Reads a request's generation options under every name that lm-eval knows.

    Args:
        options: Options of the task or the command line.
        end: The text of the end token, which also ends an answer.

    Raises:
        UserError: The options ask for more than greedy answers, or one is unknown or of a wrong
            type.
    """
    try:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), DEFAULT_NEW_TOKENS))
    except (TypeError, ValueError) as error:
        raise UserError(f"gen_kwargs: {error}") from None
    if asked.pop("do_sample"):
        raise UserError(GREEDY_ONLY)
    asked.pop("temperature", None)
    until, new_tokens = asked.pop("until"), asked.pop("max_gen_toks")
    until = [text for item in until for text in (item if isinstance(item, tuple) else (item,))]
    until = [text for text in until if text is not None]
    if not all(isinstance(text, str) for text in until):
        raise UserError(f"until: must be a text or a list of texts (got {options.get('until')!r})")
    if new_tokens < 1:
        raise UserError(f"max_gen_toks: must be at least 1 (got {new_tokens})")
    for name, value in asked.items():
        if name == "max_length":
            raise UserError("max_length: includes the prompt: give max_gen_toks instead")
        if name not in WITHOUT_EFFECT and not (name in NEUTRAL and value == NEUTRAL[name]):
            raise UserError(f"gen_kwargs: '{name}' ({value!r}) is not supported: leave it out")
    return AnswerOptions(new_tokens, tuple(filter(None, handle_stop_sequences(until, end))))


def finish(
    decode: Callable[[list[int]], str],
    tokens: list[int],
    stops: tuple[str, ...],
    mark: str | int | None,
) -> str:
    """Returns an answer's text without the thought, which ends with `mark`, and stop text."""
    if isinstance(mark, int) and mark in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(mark) :]
    text = decode(tokens)
    if isinstance(mark, int):
        text = text.lstrip()
    named = mark if isinstance(mark, str) else None
    return str(postprocess_generated_text(text, list(stops), named))
