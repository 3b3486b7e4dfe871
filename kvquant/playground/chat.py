"""`kvquant chat`: talks to a model over one quantized cache that grows turn by turn."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from kvquant.errors import UserError
from kvquant.formats.user_text import MARK
from kvquant.playground.asked_cache import asked_cache, check_number, load_asked, sampling
from kvquant.runtime.console import terse
from kvquant.runtime.progress import note

HELP = "/reset begins anew with an empty cache, /exit ends; Ctrl-C stops an answer"
LATEST = "A cache keeps its latest tokens in 16 bits, so that bits fall as a conversation grows."


def lines() -> Iterator[str]:
    """Yields what the user types, or the lines of a pipe, which are shown again."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit and remember lines
        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                print()
                return
    try:
        for number, line in enumerate(sys.stdin):
            text = (line if number else line.removeprefix(MARK)).strip()
            print(f"> {text}", flush=True)
            yield text
    except UnicodeDecodeError:
        raise UserError("standard input: is no UTF-8 text") from None


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; a second press interrupts."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def status(turn: Any) -> str:
    """Returns the line below an answer: what the cache holds, its bytes, and the speed."""
    half = 2 * turn.cache_elements
    return (
        f"[{turn.tokens:,} tokens, {turn.bits_per_element:.2f} bits per element, "
        f"{turn.cache_bytes / 1e6:,.1f} MB (fp16: {half / 1e6:,.1f}), "
        f"{turn.new_tokens / turn.seconds:.1f} tokens/s{'' if turn.ended else ', cut'}]"
    )


def talk(conversation: Any, max_new_tokens: int, told: Callable[[str], None]) -> None:
    """Answers turns until the user ends.

    Args:
        conversation: A :class:`kvquant.playground.conversation.Conversation`.
        max_new_tokens: Length of the longest answer in tokens.
        told: Prints a line that is no answer.
    """
    from transformers import TextStreamer

    tokenizer = conversation.qm.tokenizer
    for text in lines():
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            told("[0 tokens]")
        elif text.startswith("/"):
            told(f"[{text.split()[0]} is none of these: {HELP}]")
        elif text:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                with stopping() as stop:
                    turn = conversation.ask(text, max_new_tokens, streamer=streamer, stop=stop)
            except UserError as error:  # a turn that is too long ends no conversation
                note(f"kvquant: error: {error}")
                continue
            told(status(turn))


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant chat`."""
    check_number("--max-new-tokens", args.max_new_tokens)
    options, scheme = sampling(args), asked_cache(args)
    with terse():
        import torch

        from kvquant.diagnosis.screen import Screen
        from kvquant.playground.conversation import Conversation

        qm = load_asked(args, scheme)
        torch.manual_seed(args.seed)
        conversation = Conversation(qm, system=args.system, options=options)
        screen = Screen()
        title = qm.scheme.title(args.scheme or "")
        latest = f" {LATEST}" if qm.quantizes else ""
        screen.line(f"{args.model} over the cache {title}.{latest}", "dim")
        screen.line(f"{HELP}.", "dim")
        talk(conversation, args.max_new_tokens, lambda text: screen.line(text, "dim"))
