"""`kvquant track`: logs every record of a study to Weights & Biases, offline.

Nothing else depends on it: records are read, and only the folder of logs is written. Runs are not
sent anywhere; `wandb sync` does that, where a user asks for it. A record that was logged before
with the same content is not logged again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from kvquant.analysis.problems import Problems
from kvquant.analysis.run_facts import Run, runs
from kvquant.errors import UserError
from kvquant.formats.files import canonical_json, parse_json, replace
from kvquant.study.config import load_study
from kvquant.study.tracking import TrackingSpec

LOGGED = "logged.json"  # seals of logged records by id of their run
RUNS = "runs.csv"  # the runs of the study's records; Snakemake removes it before it asks again
# Whatever the tracker keeps besides runs also lies with the logs, and it reports nothing.
_FOLDERS = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
_SET = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


@contextmanager
def _settings(folder: Path) -> Iterator[None]:
    """Sets the tracker's environment for a while; a user's own settings of it do not apply."""
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    for name in before:
        del os.environ[name]
    os.environ.update({name: str(folder / "home") for name in _FOLDERS} | _SET)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        os.environ.update(before)


def _wandb() -> ModuleType:
    """Imports the tracker.

    Raises:
        UserError: It is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(
            "tracking: wandb is not installed: install the extra `wandb` (`uv sync --extra "
            "wandb`), or remove the section"
        ) from None
    module: ModuleType = wandb
    return module


def _log(wandb: ModuleType, spec: TrackingSpec, run: Run, folder: Path) -> None:
    """Writes one run, of which a file with its id in its name is left."""
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_meta=True,  # of this machine: the record names the one that measured
        x_disable_stats=True,
    )
    started = wandb.init(
        project=spec.project,
        id=run.id,
        name=run.name,
        group=str(run.config["study"]),
        job_type=run.kind,
        config=run.config,
        dir=str(folder),
        mode="offline",
        settings=settings,
    )
    started.summary.update(run.summary)
    started.finish()


def _logged(file: Path) -> dict[str, str]:
    """Returns the seals of records that were logged; none if the file is not whole."""
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def run(args: argparse.Namespace) -> None:
    """Logs the records that were not logged before.

    Raises:
        UserError: The study has no section `tracking`, the tracker is not installed, its folder
            lies in that of results, or a record cannot be used.
    """
    study = load_study(args.study)
    if study.tracking is None:
        raise UserError("tracking: this study has no such section: add `tracking: {}` to it")
    folder, results = args.out_dir.resolve(), args.results.resolve()
    if folder.is_relative_to(results):
        raise UserError(f"--out-dir: {args.out_dir} lies in the results: choose a folder of logs")
    problems = Problems(present=args.present)
    found = list(runs(study, args.results, args.device_name, problems))
    if problems:
        raise UserError("\n".join(problems))
    wandb = _wandb()
    folder.mkdir(parents=True, exist_ok=True)
    logged = _logged(folder / LOGGED)
    new = [one for one in found if logged.get(one.id) != one.seal]
    with _settings(folder):
        for one in new:
            _log(wandb, study.tracking, one, folder)
            logged[one.id] = one.seal
            replace(folder / LOGGED, canonical_json(logged) + "\n")
    lines = ["id,name", *(f"{one.id},{one.name}" for one in found)]
    replace(folder / RUNS, "\n".join(lines) + "\n")
    print(f"track: {len(new)} of {len(found)} records logged in {args.out_dir}, the others before")
    if problems.missing:
        print(f"track: {problems.missing} records are not there yet")
