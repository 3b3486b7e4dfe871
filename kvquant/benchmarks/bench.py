"""`kvquant bench WHAT`: measures costs on random data, and how evaluations scale over GPUs."""

from __future__ import annotations

import argparse

from kvquant.benchmarks import append, jobs, kernels, scaling

WHAT = {
    "append": (append, "measure the cost of appending to a cache as it grows"),
    "jobs": (jobs, "run whole jobs of prompts and answers, by caches that take turns"),
    "kernels": (kernels, "time the headline scheme's kernels against copies, fp16 and peers"),
    "scaling": (scaling, "run the same evaluations on one GPU and on all visible ones"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant bench`."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (module, text) in WHAT.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        module.add_arguments(sub)


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant bench`."""
    WHAT[args.what][0].run(args)
