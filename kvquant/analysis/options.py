"""The options of the verbs that make tables and claims, said without importing pandas."""

from __future__ import annotations

import argparse
from pathlib import Path

_OUT_DIR = "folder of the tables to write (Parquet, each with a CSV twin)"


def aggregate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant aggregate`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--results", required=True, type=Path, help="the study's results folder")
    parser.add_argument("--device-name", required=True, help="device in perf and energy paths")
    parser.add_argument("--out-dir", required=True, type=Path, help=_OUT_DIR)
    parser.add_argument(
        "--present",
        action="store_true",
        help="of an unfinished study, what is measured so far; a table may be empty",
    )


def statistics(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant statistics`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out-dir", required=True, type=Path, help=_OUT_DIR)


def pareto(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant pareto`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out-dir", required=True, type=Path, help=_OUT_DIR)


def tables(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant tables`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out-dir", required=True, type=Path, help="gets one .tex file per table")
    parser.add_argument(
        "--numbers", type=Path, help="numbers.tex, and floats.tex beside it (not with --present)"
    )
    parser.add_argument(
        "--present",
        action="store_true",
        help="of an unfinished study, the accuracy tables of what is measured so far",
    )


def companion(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant companion`."""
    parser.add_argument("--study", required=True, help="file of the other study (YAML)")
    parser.add_argument(
        "--out-dir", required=True, type=Path, help="gets numbers.tex, tables/ and figures/"
    )


def manuscript(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant manuscript`."""
    parser.add_argument("--tex", required=True, type=Path, help="the document, such as main.tex")
    parser.add_argument(
        "--paper", required=True, type=Path, help="folder of numbers.tex, tables/ and figures/"
    )
    parser.add_argument("--out", required=True, type=Path, help="the PDF")


def html(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant html`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument(
        "--out",
        required=True,
        nargs="+",
        type=Path,
        help="FOLDER/NAME.html, or NAME.rst for its caption; an unknown name lists the known",
    )


def claims(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant claims`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out", required=True, type=Path, help="claims.csv")
    parser.add_argument("--tex", required=True, type=Path, help="claims.tex")


def plot(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant plot`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--figure", required=True, help="its name; an unknown one lists the known")
    parser.add_argument("--out", required=True, nargs="+", type=Path, help=".pdf, .svg or .png")


def report(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant report`."""
    parser.add_argument("--snakefile", required=True, type=Path, help="the workflow")
    parser.add_argument("--study", required=True, type=Path, help="study file (YAML or JSON)")
    parser.add_argument("--out", required=True, type=Path, help="report.html")


def track(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant track`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--results", required=True, type=Path, help="the study's results folder")
    parser.add_argument("--device-name", required=True, help="device in perf and energy paths")
    parser.add_argument("--out-dir", required=True, type=Path, help="folder of the tracker's files")
    parser.add_argument(
        "--present", action="store_true", help="of an unfinished study, what is measured so far"
    )
