"""Whatever stands in a file of results: it is read, or refused in one line that names the file."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvquant.analysis.tables import read_table
from kvquant.errors import UserError
from kvquant.evaluation.prompt_file import PromptFile
from kvquant.formats.files import sha256_text
from kvquant.formats.sealing import seal_of
from kvquant.study.records import (
    AppendRecord,
    EnergyRecord,
    EvalRecord,
    KernelRecord,
    Record,
    ThroughputRecord,
    read_record,
)
from kvquant.study.samples import verified_samples
from kvquant.study.tasks import SUITES
from tests.support.studies import eval_record, study_of, write_study

KINDS: dict[str, tuple[type[Record], str]] = {
    "eval": (EvalRecord, "eval/tiny/nuq3/qasper/seed0/run.json"),
    "perf": (ThroughputRecord, "perf/gpu/tiny/nuq3/short/rep0.json"),
    "energy": (EnergyRecord, "energy/gpu/tiny/nuq3/short/rep0.json"),
    "append": (AppendRecord, "append/gpu/rep0.json"),
    "kernels": (KernelRecord, "kernels/gpu/one.json"),
}
FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", 0, 1, 0.0, -1, 1e308, "nan", "1.0", "../../x"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def only_one_line(read: Callable[[], object], name: str) -> None:
    """Calls what reads a file: nothing but a UserError of one line may come out."""
    try:
        read()
    except UserError as error:
        assert name in str(error) and len(str(error).splitlines()) == 1, str(error)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_study(study_of(seeds=[0]), folder)
    return folder


@FEW
@given(
    raw=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))
)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_for_a_record(tmp_path: Path, kind: str, raw: bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(raw)
    only_one_line(lambda: read_record(file, KINDS[kind][0]), "x.json")


@st.composite
def replaced(draw: st.DrawFn, raw: Any) -> Any:
    """A JSON value in which one place, however deep, holds something else."""
    if isinstance(raw, dict) and raw and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(raw)))
        return raw | {key: draw(replaced(raw[key]))}
    if isinstance(raw, list) and raw and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(raw) - 1))
        return [*raw[:at], draw(replaced(raw[at])), *raw[at + 1 :]]
    return draw(VALUES)


@pytest.mark.parametrize("kind", KINDS)
def test_values_in_a_record(finished: Path, tmp_path: Path, kind: str) -> None:
    """Also where someone gave the wrong content its right seal."""
    model, name = KINDS[kind]
    good = json.loads((finished / name).read_text())
    file = tmp_path / "x.json"

    @FEW
    @given(raw=replaced(good))
    def check(raw: Any) -> None:
        if isinstance(raw, dict):
            with contextlib.suppress(ValueError):
                raw = raw | {"seal": seal_of(raw)}
        file.write_text(json.dumps(raw))
        only_one_line(lambda: read_record(file, model), "x.json")

    check()


@pytest.mark.parametrize("suite", SUITES)
def test_samples(finished: Path, suite: str) -> None:
    tasks = {"perplexity": "ppl", "passkey": "passkey", "ruler": "ruler", "longbench": "qasper"}
    task = tasks.get(suite, "qasper")  # own prompts have the fields of its rows but one
    text = (finished / f"eval/tiny/nuq3/{task}/seed0/samples.jsonl").read_text()
    good = [json.loads(line) for line in text.split("\n") if line]
    if suite == "prompts":
        good = [{k: v for k, v in row.items() if k != "cut"} for row in good]

    def read(text: str) -> None:
        try:
            digest = sha256_text(text)
        except UnicodeEncodeError:  # cannot come out of a file
            return
        record = eval_record(suite=suite, samples_sha256=digest)
        only_one_line(lambda: verified_samples(record, text, "s.jsonl", "again"), "s.jsonl")

    @FEW
    @given(rows=replaced(good))
    def values(rows: Any) -> None:
        lines = rows if isinstance(rows, list) else [rows]
        read("".join(json.dumps(row) + "\n" for row in lines))

    @FEW
    @given(text=st.text(max_size=100))
    def texts(text: str) -> None:
        read(text)

    values()
    texts()


@FEW
@given(raw=st.binary(max_size=200), packed=st.booleans(), head=replaced({"seeds": [], "spec": {}}))
def test_prompts(tmp_path: Path, raw: bytes, packed: bool, head: Any) -> None:
    file = tmp_path / "p.gz"
    content = raw if not packed else json.dumps(head).encode() + b"\n" + raw
    file.write_bytes(gzip.compress(content) if packed else content)
    only_one_line(lambda: PromptFile(file, "0" * 16, [0]).read([0]), "p.gz")


@FEW
@given(raw=st.binary(max_size=300), magic=st.booleans())
def test_tables(tmp_path: Path, raw: bytes, magic: bool) -> None:
    file = tmp_path / "eval.parquet"
    file.write_bytes(b"PAR1" + raw + b"PAR1" if magic else raw)
    only_one_line(lambda: read_table(tmp_path, "eval"), "eval.parquet")
