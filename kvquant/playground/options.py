"""The options of `kvquant generate`, `chat` and `compare`, said without importing torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DEFAULT_SCHEME = "int4-hadamard"
_SCHEME = "a scheme's name or kind, or kind=kivi,bits=2"
_QUANTIZER = "folder or hub id of a quantizer (`kvquant calibrate` makes one)"


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")


def _cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quantizer", help=_QUANTIZER)
    parser.add_argument(
        "--scheme", help=f"{_SCHEME}; default: the quantizer's, or {DEFAULT_SCHEME} without one"
    )
    _prompt_attention(parser, "over the cache")


def _prompt_attention(parser: Any, whose: str) -> None:
    parser.add_argument(
        "--prompt-attention",
        choices=("16-bit", "8-bit"),
        help=f"in how many bits prompts attend {whose}; default: as the scheme says, else 16-bit",
    )


def _answers(parser: argparse.ArgumentParser, tokens: int) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=tokens,
        metavar="N",
        help=f"tokens of the longest answer; default: {tokens}",
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, help="samples; default: greedy answers"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, help="samples from the most probable share"
    )
    parser.add_argument(
        "--top-k", metavar="K", type=int, help="samples from the most probable tokens"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling; default: 0")


def generate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant generate`."""
    _model(parser)
    _cache(parser)
    parser.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one or several prompts"
    )
    parser.add_argument(
        "--prompt-file",
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="each a prompt (without its last line end); neither: standard input",
    )
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    _answers(parser, 128)
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="prompts at a time; default: 16"
    )


def chat(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant chat`."""
    _model(parser)
    _cache(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first turn")
    _answers(parser, 512)


def compare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant compare`."""
    _model(parser)
    caches = parser.add_argument_group("caches, beside the unquantized one")
    caches.add_argument(
        "--quantizer", nargs="+", action="extend", default=[], metavar="QUANTIZER", help=_QUANTIZER
    )
    caches.add_argument(
        "--scheme",
        nargs="+",
        action="extend",
        default=[],
        metavar="SCHEME",
        help=f"{_SCHEME}; neither: fp8, {DEFAULT_SCHEME} and kivi-4",
    )
    _prompt_attention(caches, "over these caches")
    caches.add_argument(
        "--calibrate-on",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="texts for schemes that need calibration and have no quantizer",
    )
    caches.add_argument("--windows", type=int, metavar="N", help="of --calibrate-on; default: 16")
    caches.add_argument(
        "--window", type=int, metavar="N", help="tokens of each; default: up to 2048"
    )
    prompt = parser.add_argument_group("what the model reads: --prompt-file or --text")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="a prompt, all of it, which is answered"
    )
    prompt.add_argument(
        "--text", type=Path, metavar="FILE", help="a text, which is read and not answered"
    )
    prompt.add_argument("--question", metavar="TEXT", help="asked after the prompt file")
    prompt.add_argument("--chat", action="store_true", help="apply the model's chat template")
    prompt.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="read the file's first N tokens; default: all of a prompt file, 1024 of a text",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens of the answer, and steps that are timed; default: 32",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of timing, in turns; default: 3"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object (docs/cli.md)")
