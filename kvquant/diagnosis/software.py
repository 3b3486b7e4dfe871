"""Checks of Python, packages, programs, data and network, which need neither torch nor a GPU."""

from __future__ import annotations

import functools
import importlib.metadata as metadata
import os
import platform
import shutil
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from kvquant import __version__
from kvquant.analysis.manuscript import PACKAGES
from kvquant.diagnosis.checks import Check, Found, look
from kvquant.fetch.datasets import local_names
from kvquant.study.datasets import DATASETS

HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
COMMAND_SECONDS = 5.0
SLURM = ("sbatch", "squeue", "sinfo", "scancel")
# Optional packages, with what needs them and how they are installed.
OPTIONAL: dict[str, tuple[str, str]] = {
    "optimum-quanto": ("scheme kind hf-quanto", "pip install 'kvquant[peers]'"),
    "hqq": ("scheme kind hf-hqq", "pip install 'kvquant[peers]'"),
    "wandb": ("tracking", "pip install 'kvquant[wandb]'"),
    "lm-eval": ("verbs of the workflow", "pip install 'kvquant[workflow]'"),
    "snakemake": ("the workflow", "pip install 'kvquant[workflow]'"),
    "snakemake-executor-plugin-slurm": (
        "the workflow on a cluster",
        "pip install 'kvquant[workflow]'",
    ),
}


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _declared() -> tuple[str, tuple[str, ...]]:
    """Returns the Python versions and the packages that this package says it needs.

    A source tree that is not installed says so in its pyproject.toml.
    """
    try:
        declared = metadata.metadata("kvquant")
        return declared["Requires-Python"] or "", tuple(declared.get_all("Requires-Dist") or ())
    except metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parents[2] / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], tuple(project["dependencies"])


def _required() -> dict[str, str]:
    """Returns the ranges of versions that this package needs, by package."""
    from packaging.requirements import Requirement

    found = {}
    for text in _declared()[1]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = str(requirement.specifier)
    return found


def _inside(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _python() -> Found:
    version, wanted = platform.python_version(), _declared()[0]
    if not wanted or _inside(version, wanted):
        return "ok", version, ""
    return "missing", f"{version}, and kvquant needs {wanted}", f"install Python {wanted}"


def _packages() -> Found:
    required = _required()
    wrong = []
    for name, wanted in required.items():
        version = version_of(name)
        if version is None:
            wrong.append((name, wanted, "none"))
        elif not _inside(version, wanted):
            wrong.append((name, wanted, version))
    if not wrong:
        return "ok", f"kvquant {__version__} and the {len(required)} packages that it needs", ""
    told = ", ".join(f"{name}{wanted} (found {version})" for name, wanted, version in wrong)
    install = " ".join(f"'{name}{wanted}'" for name, wanted, _ in wrong)
    return "missing", told, f"pip install {install}"


def _transformers() -> Found:
    wanted, version = _required()["transformers"], version_of("transformers")
    if version is None:
        return "missing", "not installed", f"pip install 'transformers{wanted}'"
    if _inside(version, wanted):
        return "ok", f"{version}, inside {wanted}", ""
    return "missing", f"{version}, outside {wanted}", f"pip install 'transformers{wanted}'"


def _optional(package: str) -> Found:
    use, install = OPTIONAL[package]
    version = version_of(package)
    if version is not None:
        return "ok", version, ""
    return "warning", f"not installed; {use} needs it", install


def _latex() -> Found:
    found = [name for name in ("latexmk", "pdflatex") if shutil.which(name)]
    if len(found) == 2:
        return "ok", "latexmk and pdflatex", ""
    lacking = "no pdflatex" if found == ["latexmk"] else "no latexmk"
    fix = f"apt-get install {PACKAGES}"
    return "warning", f"{lacking}; the paper's PDF needs both", fix


def _slurm() -> Found:
    absent = [name for name in SLURM if not shutil.which(name)]
    if absent == list(SLURM):
        return "warning", "no commands of Slurm", "on a cluster, run this on a login node"
    if absent:
        return "missing", f"no {', '.join(absent)}", "install Slurm's client commands"
    version = subprocess.run(
        ["sinfo", "--version"], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    ).stdout.strip()
    try:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format=%P"],
            capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        told = f"{version}; the controller did not answer in {COMMAND_SECONDS:.0f} s"
        return "warning", told, "try again, or ask the cluster's operators"
    if asked.returncode:
        told = (asked.stderr.strip().splitlines() or ["sinfo failed"])[0]
        # Without a configuration, `sinfo --version` fails too and prints no version.
        found = f"{version}; {told}" if version else told
        return "warning", found, "check SLURM_CONF and the controller"
    partitions = " ".join(asked.stdout.split())
    return "ok", f"{version}, partitions {partitions or 'none'}", ""


def _hub() -> Found:
    url = os.environ.get("HF_ENDPOINT") or HUB
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return "ok", f"{url} answers", ""
    except urllib.error.HTTPError:  # it answered, which is all that was asked
        return "ok", f"{url} answers", ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        fix = "use models and data in folders, set HF_ENDPOINT to a mirror, or check the proxy"
        return "warning", f"{url} is not reachable ({str(reason).splitlines()[0]})", fix


def software_checks() -> Iterator[Check]:
    """Yields the checks of Python, packages and programs."""
    yield look("software", "python", _python, needed=True)
    yield look("software", "packages", _packages, needed=True)
    yield look("software", "transformers", _transformers, needed=True)


def optional_checks() -> Iterator[Check]:
    """Yields the checks of what only some uses need."""
    for package in OPTIONAL:
        name = package.replace("snakemake-executor-plugin-slurm", "slurm plugin")
        yield look("optional", name, functools.partial(_optional, package))
    yield look("optional", "LaTeX", _latex)
    yield look("optional", "Slurm", _slurm)


def hub_check(offline: bool) -> Check:
    """Returns whether the hub answers.

    Args:
        offline: Whether it shall not be asked.
    """
    if offline:
        return Check("data", "hub", "skipped", "not asked (--offline)")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("data", "hub", "skipped", "not asked (HF_HUB_OFFLINE is set)")
    return look("data", "hub", _hub)


def data_checks(folder: Path | None) -> Iterator[Check]:
    """Yields which data sets a folder of local data holds.

    Args:
        folder: The folder; None: there is none.
    """
    if folder is None:
        fix = "set KVQUANT_DATA_DIR, or give --data-dir FOLDER"
        told = "no folder of local data: texts come from the hub and the package index"
        yield Check("data", "data folder", "skipped", told, fix)
        return
    if not folder.is_dir():
        yield Check("data", "data folder", "missing", f"no such folder: {folder}", "name another")
        return
    yield Check("data", "data folder", "ok", str(folder))
    groups: dict[str, dict[str, bool]] = {}
    for name in DATASETS:
        if names := local_names(name):
            there = any((folder / file).is_file() for file in names)
            groups.setdefault(name.partition("-")[0], {})[name] = there
    for group, members in groups.items():
        absent = [name for name, there in members.items() if not there]
        first = local_names((absent or list(members))[0])[0]
        if not absent:
            found = first if len(members) == 1 else f"all {len(members)} tasks"
            yield Check("data", group, "ok", found)
        else:
            told = f"no {first}" if len(members) == 1 else f"no {', '.join(absent)}"
            fix = f"put {first} there, or let the workflow fetch it"
            yield Check("data", group, "warning", told, fix)
