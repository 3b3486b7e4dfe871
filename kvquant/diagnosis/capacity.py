"""`kvquant capacity`: how many tokens and prompts fit in a GPU's memory, by formula."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from kvquant import __version__
from kvquant.diagnosis.fitting import DRIVER, LIBRARIES, Fit, Room, fit
from kvquant.diagnosis.model_facts import CacheFacts, ModelFacts, read_model
from kvquant.diagnosis.screen import Screen, json_out
from kvquant.diagnosis.several_gpus import part_of_gpu
from kvquant.diagnosis.sizes import in_gb, size_in_bytes
from kvquant.diagnosis.weights import DTYPES, weight_bytes, weight_dtype
from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.runtime.console import waiting
from kvquant.study.asked_schemes import asked_schemes
from kvquant.study.jobs import CONTEXT_CHUNK
from kvquant.study.limits import MAX_BATCH, MAX_TOKENS

SCHEMA = 1  # of the JSON
MAX_GPUS = 64
BASELINE = "fp16"
PROMPT = 4096  # tokens, where none are asked for and the model takes as many
DEFAULT = (
    *("fp16", "allocated-4", "allocated-3", "allocated-2", "nuq4-1pct", "nuq3-1pct", "nuq2-1pct"),
    *("kivi-4", "kivi-2", "turboquant-3", "int4-hadamard", "fp8"),
)


def _in_range(field: str, number: int | None, most: int) -> None:
    if number is not None and not 1 <= number <= most:
        raise UserError(f"{field}: {number:,} is not between 1 and {most:,}")


def prompt_for(asked: int | None, positions: int) -> int:
    """Returns the tokens per prompt.

    Args:
        asked: What was asked for; None for the default.
        positions: The longest sequence of the model.

    Raises:
        UserError: The model does not take such a prompt.
    """
    if asked is not None and asked > positions:
        raise UserError(f"--prompt: {asked:,} exceeds the model's {positions:,} positions")
    return min(PROMPT, positions) if asked is None else asked


def room_for(args: argparse.Namespace, model: ModelFacts) -> Room:
    """Returns the memory that the options describe: of the GPU that is full first.

    Raises:
        UserError: A size is wrong, the model is refused, its weights do not fit, or so many GPUs
            cannot share it.
    """
    memory = size_in_bytes(args.memory, "--memory")
    reserve = DRIVER + LIBRARIES
    if args.reserve is not None:
        reserve = size_in_bytes(args.reserve, "--reserve")
    if model.cache is None:
        raise UserError(str(model.refused))
    dtype = weight_dtype(model, args.dtype)
    if args.weights is not None:
        weights = size_in_bytes(args.weights, "--weights")
    else:
        weights = weight_bytes(model, dtype)
    facts, weights = part_of_gpu(model, model.cache, weights, args.gpus, args.split)
    plain = None
    if args.gpus > 1 and args.split == "heads" and model.gathers:
        plain = model.cache  # transformers' caches hold what every process computes
    room = Room(memory, weights, reserve, facts, DTYPES[dtype].itemsize, plain)
    taken = weights + reserve + room.activations(1)
    if taken >= memory:
        smaller = " or a smaller dtype" if dtype == "float32" else " or quantized weights"
        raise UserError(
            f"--memory: {in_gb(memory)} do not hold the weights in {dtype} ({in_gb(weights)}) "
            f"beside driver and libraries ({in_gb(reserve)}); take more than {in_gb(taken)},"
            f"{smaller}"
        )
    return room


def report(args: argparse.Namespace, model: ModelFacts, room: Room) -> dict[str, Any]:
    """Returns everything that is printed, as the JSON has it."""
    schemes = asked_schemes(list(dict.fromkeys(args.scheme or DEFAULT)))
    base = fit(asked_schemes([BASELINE])[BASELINE], room, args.prompt)
    fits = {name: fit(scheme, room, args.prompt, args.batch) for name, scheme in schemes.items()}
    call, chunk = room.call(args.prompt), min(CONTEXT_CHUNK, room.facts.positions)
    whole = model.cache
    assert whole is not None
    return {
        "schema": SCHEMA,
        "kvquant": __version__,
        "measured": False,
        "model": {
            "name": model.name,
            "family": model.family,
            "parameters": model.parameters,
            "layers_that_see_all_tokens": whole.full_layers,
            "sliding_windows": whole.own_windows,
            "kv_heads": whole.kv_heads,
            "head_dim": whole.head_dim,
            "longest_sequence": room.facts.positions,
        },
        "gpus": args.gpus,
        "split": args.split,
        "memory_bytes": room.memory,
        "weight_bytes": room.weights,
        "weight_dtype": weight_dtype(model, args.dtype),
        "reserve_bytes": room.reserve,
        "prompt": args.prompt,
        "batch": args.batch,
        "call_tokens": call,
        "activation_bytes": room.activations(call),
        "cache_bytes": room.for_cache(call),
        "chunk_tokens": chunk,
        "chunk_activation_bytes": room.activations(chunk),
        "schemes": [
            {"scheme": name, "kind": schemes[name].kind, **asdict(one), **_over(one, base)}
            for name, one in fits.items()
        ],
    }


def _over(one: Fit, base: Fit) -> dict[str, float | None]:
    known = one.tokens is not None and base.tokens
    return {"over_fp16": (one.tokens or 0) / base.tokens if known and base.tokens else None}


def _one_of(found: dict[str, Any]) -> str:
    """Returns which of several GPUs the memory is of."""
    if found["gpus"] == 1:
        return ""
    which = "the fullest" if found["split"] == "layers" else "each"
    return f"{which} of {found['gpus']}, which have {found['split']}"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def show(found: dict[str, Any], facts: CacheFacts, screen: Screen) -> None:
    """Prints the report for people."""
    model = found["model"]
    layers = f"{model['layers_that_see_all_tokens']} layers"
    if windows := model["sliding_windows"]:
        layers += f" that see all tokens and {len(windows)} with a window of {windows[0]:,}"
    screen.line(
        f"{model['name']} ({model['family']}): {layers}, kv heads: "
        f"{model['kv_heads']} of {model['head_dim']}, up to {model['longest_sequence']:,} tokens",
        "bold",
    )
    call, chunk = found["call_tokens"], found["chunk_tokens"]
    billions = f"{model['parameters'] / 1e9:,.2f} billion, {found['weight_dtype']}"
    activations = f"of a call of {call:,} tokens"
    if chunk != call:
        activations += f"; {in_gb(found['chunk_activation_bytes'])} of {chunk:,}"
    if facts.eager:
        activations += ", with all scores"
    screen.table(
        ("memory", "GB", "of it"),
        [
            ("GPU", f"{found['memory_bytes'] / 1e9:,.2f}", _one_of(found)),
            ("weights", f"{found['weight_bytes'] / 1e9:,.2f}", billions),
            ("driver, libraries", f"{found['reserve_bytes'] / 1e9:,.2f}", "set by --reserve"),
            ("activations", f"{found['activation_bytes'] / 1e9:,.2f}", activations),
            ("caches", f"{found['cache_bytes'] / 1e9:,.2f}", "what is left"),
        ],
        right=("GB",),
        wide=("of it",),
    )
    batch = found["batch"]
    heads = ["scheme", "bits", "kB/token", "tokens", "x fp16", "prompts", "longest"]
    heads += [] if batch is None else [f"each of {batch:,}"]
    rows, problems = [], []
    for one in found["schemes"]:
        if one["problem"]:
            problems.append(f"{one['scheme']}: {one['problem']}")
            continue
        limited = "*" if one["longest"] == model["longest_sequence"] else ""
        row = [
            one["scheme"],
            f"{one['bits_per_element']:.2f}",
            f"{one['bytes_per_token'] / 1e3:,.1f}",
            _count(one["tokens"]),
            "" if one["over_fp16"] is None else f"{one['over_fp16']:.2f}",
            _count(one["prompts"]),
            _count(one["longest"]) + limited,
        ]
        if batch is not None:
            length = one["longest_of_batch"]
            row.append(_count(length) + ("*" if length == model["longest_sequence"] else ""))
        rows.append(row)
    if rows:
        screen.table(heads, rows, right=heads[1:])
    told = (
        f"bits: per element, everything counted. tokens: of prompts of {found['prompt']:,}, "
        f"prefilled one after the other; prompts: so many at once. longest: a single prompt, in "
        f"calls of {chunk:,}."
    )
    if batch is not None:
        told += f" each of {batch:,}: how long each prompt can be if all are held at once."
    screen.line(told)
    if any(row[-1].endswith("*") or row[6].endswith("*") for row in rows):
        screen.line("*: the longest sequence that the model supports.")
    for problem in problems:
        screen.line(problem)
    if found["gpus"] > 1:
        screen.line("Bytes are those on one GPU; tokens are those of the whole model.")
    screen.line(
        "This is a formula: nothing was measured. Searches on an H200 found what it says within "
        "15 % (7B and 8B shapes); `kvquant bench jobs` searches on your GPU. Text unlike the "
        "calibration's has more outliers than are counted."
    )


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant capacity`."""
    _in_range("--prompt", args.prompt, MAX_TOKENS)
    _in_range("--batch", args.batch, MAX_BATCH)
    _in_range("--gpus", args.gpus, MAX_GPUS)
    asked_schemes(args.scheme or [])  # wrong words, before anything takes time
    size_in_bytes(args.memory, "--memory")
    name = asked_model(args.model)
    from transformers.utils import logging

    logging.set_verbosity_error()  # a configuration's odd token ids are not the subject
    with waiting("computing"):
        model = read_model(name)
        room = room_for(args, model)
        args.prompt = prompt_for(args.prompt, room.facts.positions)
        found = report(args, model, room)
    if args.json:
        json_out(json.dumps(found, indent=2))
    else:
        show(found, room.facts, Screen())
