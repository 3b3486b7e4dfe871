"""`kvquant generate`: answers one or several prompts over a quantized cache."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from kvquant.errors import UserError
from kvquant.formats.files import is_text
from kvquant.formats.user_text import MARK, read_prose
from kvquant.playground.asked_cache import asked_cache, check_number, load_asked, sampling
from kvquant.runtime.console import terse, waiting
from kvquant.runtime.progress import note

SHOWN = 60  # characters of a prompt above its answer, where there are several


def prompt_of_file(file: Path, option: str) -> str:
    """Returns the text of a file without its last line end, which editors add.

    Raises:
        UserError: It cannot be read, or is empty.
    """
    text = read_prose(file, option).removesuffix("\n").removesuffix("\r")
    if not text:
        raise UserError(f"{option}: {file} is empty")
    return text


def asked_prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts of --prompt, of --prompt-file, or of standard input.

    Raises:
        UserError: There are none, or both options are given, or one is no text.
    """
    if args.prompt and args.prompt_file:
        raise UserError(
            "--prompt: prompts are given or in files; leave --prompt or --prompt-file out"
        )
    if args.prompt_file:
        return [prompt_of_file(file, "--prompt-file") for file in args.prompt_file]
    if args.prompt:
        for text in args.prompt:
            if not is_text(text):
                raise UserError("--prompt: is no UTF-8 text")
        return list(args.prompt)
    if sys.stdin.isatty():
        raise UserError("--prompt: is missing; give texts, --prompt-file, or pipe one in")
    try:
        text = sys.stdin.read().removeprefix(MARK).removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("standard input: is no UTF-8 text") from None
    if not text:
        raise UserError("--prompt: is missing, and standard input is empty")
    return [text]


def heading(prompt: str) -> str:
    """Returns the beginning of a prompt on one line, which stands above its answer."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3].rstrip()}..."


def answer(qm: Any, prompts: list[str], args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Prints the answers: that to a single prompt as it grows."""
    from transformers import TextStreamer

    from kvquant.models.text_generation import generate

    given = {"chat": args.chat, "batch_size": args.batch_size, **options}
    if len(prompts) == 1:
        streamer = TextStreamer(qm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate(qm, prompts, args.max_new_tokens, streamer=streamer, **given)
        return
    with waiting(f"answering {len(prompts)} prompts"):
        answers = generate(qm, prompts, args.max_new_tokens, **given)
    for number, (prompt, text) in enumerate(zip(prompts, answers, strict=True)):
        print(f"{'' if number == 0 else chr(10)}> {heading(prompt)}\n{text}")


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant generate`."""
    check_number("--max-new-tokens", args.max_new_tokens)
    check_number("--batch-size", args.batch_size)
    options, scheme = sampling(args), asked_cache(args)
    prompts = asked_prompts(args)
    with terse():
        qm = load_asked(args, scheme)
        import torch

        torch.manual_seed(args.seed)
        start = time.monotonic()
        answer(qm, prompts, args, options)
        count = "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
        title = qm.scheme.title(args.scheme or "")
        note(f"{count} over the cache {title} in {time.monotonic() - start:.1f} s")
