"""`kvquant compare`: one prompt over the fp16 cache and others, side by side."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvquant import __version__
from kvquant.errors import UserError
from kvquant.fetch.asked_model import asked_model
from kvquant.playground.asked_cache import check_number
from kvquant.playground.compared import check_schemes, load_compared
from kvquant.playground.generate import prompt_of_file
from kvquant.runtime.console import terse
from kvquant.runtime.progress import on_terminal

SCHEMA = 1  # of the JSON
TEXT_TOKENS = 1024  # of a text, where --tokens does not say


@dataclass(frozen=True)
class Asked:
    """What the model reads.

    Attributes:
        file: The file.
        option: The option that named it.
        text: What is read of it.
        tokens: Number of tokens that --tokens takes of it; None: all of a prompt file, the first
            1024 of a text.
        question: What is asked after it; None: nothing.
        chat: Whether the chat template is applied.
    """

    file: Path
    option: str
    text: str
    tokens: int | None
    question: str | None
    chat: bool

    @property
    def answered(self) -> bool:
        """Whether the answers are shown."""
        return self.option == "--prompt-file"


def asked(args: argparse.Namespace) -> Asked:
    """Returns what the options say is read.

    Raises:
        UserError: There is no file, or there are two, or an option does not go with it.
    """
    if (args.text is None) == (args.prompt_file is None):
        both = args.text is not None
        told = "leave one of them out" if both else "give a prompt file to answer, or --text"
        raise UserError(
            f"--prompt-file: {'--text is given, too' if both else 'is missing'}; {told}"
        )
    if args.text is not None:
        for name in ("question", "chat"):
            if getattr(args, name):
                raise UserError(f"--{name}: a text is not answered; give it as --prompt-file")
    if args.tokens is not None:
        check_number("--tokens", args.tokens, 2)
    option = "--text" if args.text is not None else "--prompt-file"
    file = args.text or args.prompt_file
    text = prompt_of_file(file, option)
    return Asked(file, option, text, args.tokens, args.question, args.chat)


def prompt(tokenizer: Any, what: Asked, most: int) -> tuple[str, list[int]]:
    """Returns the prompt, without a chat template, and its token ids.

    Args:
        tokenizer: The tokenizer.
        what: What is read.
        most: Largest number of tokens that leaves the model positions for the answer.

    Raises:
        UserError: There are too many or too few tokens, or no chat template.
    """
    from kvquant.models.text_generation import tokenized

    text = what.text
    if not what.answered:
        ids = tokenized(tokenizer, [text], chat=False)[0]
        ids = ids[: what.tokens or max(2, min(TEXT_TOKENS, most))]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
    else:
        if what.tokens is not None:
            cut = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: what.tokens]
            text = str(tokenizer.decode(cut))
        if what.question is not None:
            text = f"{text}\n\n{what.question}"
        ids = tokenized(tokenizer, [text], what.chat)[0]
    if len(ids) < 2:
        raise UserError(f"{what.option}: {what.file} has {len(ids)} token; 2 are needed")
    if len(ids) > most:
        raise UserError(
            f"{what.option}: {len(ids):,} tokens, but with the answer the model has positions for "
            f"{most:,}; read fewer by --tokens {max(2, most - 64)}"
        )
    return text, ids


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the comparison and returns all that is printed, as the JSON has it.

    Raises:
        UserError: An option is wrong, or the model or a cache does not fit.
    """
    what = asked(args)
    check_number("--max-new-tokens", args.max_new_tokens)
    check_number("--rounds", args.rounds)
    schemes = check_schemes(args)
    model = asked_model(args.model)
    with terse():
        from kvquant.models.generation import check_ids
        from kvquant.models.loading import load_tokenizer
        from kvquant.playground.side_by_side import CHUNK, measure, protocol_for

        # before weights are loaded, because a prompt may be too long
        tokenizer, positions = load_tokenizer(model)
        most = positions - args.max_new_tokens
        if most < 2:
            raise UserError(
                f"--max-new-tokens: {args.max_new_tokens:,} leaves the prompt no room among the "
                f"model's {positions:,} positions; give fewer"
            )
        text, ids = prompt(tokenizer, what, most)
        caches = load_compared(args, schemes)
        qm = caches[0].qm
        check_ids(qm.model, [ids])
        with on_terminal("compare", "steps") as progress:
            sides = measure(
                caches,
                ids,
                new_tokens=args.max_new_tokens,
                rounds=args.rounds,
                progress=progress,
            )
        rows = [_row(side, sides[0], text, what.answered) for side in sides]
    protocol = protocol_for(caches)
    return {
        "schema": SCHEMA,
        "kvquant": __version__,
        "status": 1 if any(row["problem"] for row in rows) else 0,
        "model": args.model,
        "device": str(qm.device),
        "dtype": str(qm.dtype).removeprefix("torch."),
        "file": str(what.file),
        "question": what.question,
        "chat": what.chat,
        "prompt_tokens": len(ids),
        "new_tokens": args.max_new_tokens,
        "rounds": args.rounds,
        "protocol": protocol,
        "chunk": CHUNK if protocol == "A" else None,
        "caches": rows,
    }


def _row(side: Any, fp16: Any, read: str, answered: bool) -> dict[str, Any]:
    """Returns one cache's part of the JSON."""
    from kvquant.fetch.text_overlap import shared_share
    from kvquant.playground.side_by_side import agreeing

    cache = side.cache
    text = None if cache.quantizer is None else cache.quantizer.manifest.text
    prefill, decode = side.times(side.prefill), side.times(side.decode)
    compared = answered and bool(side.cache_bytes and fp16.cache_bytes)
    return {
        "cache": cache.name,
        "title": cache.title,
        "kind": cache.scheme.kind,
        "prompt_attention": cache.scheme.prompt_attention,
        "calibrated_here": cache.calibrated_here,
        "calibration_overlap": None if text is None else shared_share(text, read),
        "problem": side.problem or None,
        "cache_bytes": side.cache_bytes or None,
        "bits_per_element": 8 * side.cache_bytes / side.cache_elements
        if side.cache_elements
        else None,
        "prefill_ms": None if prefill is None else prefill.model_dump(mode="json"),
        "decode_ms_per_token": None if decode is None else decode.model_dump(mode="json"),
        "distance": None if side.distance is None else asdict(side.distance),
        "answer": str(cache.qm.tokenizer.decode(side.tokens, skip_special_tokens=True))
        if compared
        else None,
        "answer_tokens": len(side.tokens) if compared else None,
        "same_tokens": agreeing(side.tokens, fp16.tokens) if compared else None,
        "same_answer": side.tokens == fp16.tokens if compared else None,
    }


def run(args: argparse.Namespace) -> int:
    """Runs `kvquant compare`; returns 1 if a cache could not be measured."""
    found = report(args)
    if args.json:
        from kvquant.diagnosis.screen import json_out

        json_out(json.dumps(found, indent=2))
    else:
        from kvquant.diagnosis.screen import Screen
        from kvquant.playground.compare_screen import show

        show(found, Screen())
    return int(found["status"])
