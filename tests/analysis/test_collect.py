"""Collecting: what a record says of itself is recomputed, also where someone sealed it again.

Also covers: analysis.cost_rows, analysis.eval_rows, analysis.problems, analysis.spec_checks,
study.record_checks, study.sample_types, study.samples.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvquant.analysis.collect import collect
from kvquant.analysis.problems import Problems
from kvquant.errors import UserError
from kvquant.formats.sealing import seal_of
from kvquant.study.config import Study
from kvquant.study.sample_types import check_windows
from tests.support.studies import DEVICE, sample_rows, study_of, write_study

Change = Callable[[dict[str, Any]], Any]
EVAL = "eval/tiny/kivi-4/passkey/seed0/run.json"
PPL = "eval/tiny/kivi-4/ppl/seed0/run.json"
LONG = "eval/tiny/kivi-4/qasper/seed1/run.json"
PERF = "perf/gpu/tiny/nuq3/short/rep0.json"
ENERGY = "energy/gpu/tiny/nuq3/short/rep0.json"
APPEND = "append/gpu/rep0.json"
KERNELS = "kernels/gpu/one.json"


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of()


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_study(study, folder)
    return folder


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def sealed_again(file: Path, change: Change) -> None:
    """Edits a record and gives it the seal of the edited content."""
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw | {"seal": seal_of(raw)}, indent=2) + "\n")


def refused(study: Study, results: Path) -> str:
    with pytest.raises(UserError) as error:
        collect(study, results, DEVICE)
    return str(error.value)


def test_a_finished_study_is_collected(study: Study, results: Path) -> None:
    tables = collect(study, results, DEVICE)
    assert len(tables["eval"]) == 3 * 4 * 2 and len(tables["perf"]) == 4
    assert tables["energy"]["energy_ratio"].between(0.9, 1.1).all()


def put(*path: Any, to: Any) -> Change:
    """Sets a field."""

    def change(raw: dict[str, Any]) -> None:
        for part in path[:-1]:
            raw = raw[part]
        raw[path[-1]] = to

    return change


def scaled(*path: Any, by: float = 1.01) -> Change:
    """Multiplies a number."""

    def change(raw: dict[str, Any]) -> None:
        for part in path[:-1]:
            raw = raw[part]
        raw[path[-1]] *= by

    return change


@pytest.mark.fault(
    "records",
    "an edited field, and the record sealed again",
    "refused: other numbers or the samples say otherwise",
)
@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        (EVAL, put("value", to=51.0), "field 'value'"),
        (EVAL, put("metrics", "accuracy", to=51.0), "field 'value'"),
        (EVAL, lambda r: r.update(value=1.0, metrics={"accuracy": 1.0}), "its samples give"),
        (EVAL, put("samples", to=3), "field 'samples'"),
        (EVAL, put("tokens", to=1), "field 'tokens'"),
        (EVAL, put("cache_bytes", to=5), "field 'bits_per_element'"),
        (EVAL, scaled("bits_per_element"), "field 'bits_per_element'"),
        (EVAL, put("protocol", to="B"), "field 'protocol'"),
        (EVAL, put("suite", to="ruler"), "field 'suite'"),
        (EVAL, put("metric", to="score"), "field 'value'"),
        (EVAL, put("higher_is_better", to=False), "field 'higher_is_better'"),
        (EVAL, put("seed", to=1), "the file lies under '0'"),
        (EVAL, put("scheme", to="fp16"), "the file lies under 'kivi-4'"),
        (EVAL, put("model", to="other"), "the file lies under 'tiny'"),
        (EVAL, put("task", to="ruler"), "the file lies under 'passkey'"),
        (EVAL, put("spec_digest", to="0" * 16), "measured with another configuration"),
        (EVAL, put("prompts_sha256", to="9" * 64), "field 'prompts_sha256'"),
        (EVAL, put("inputs", "model", to="b" * 64), "field 'inputs.model'"),
        (EVAL, put("samples_sha256", to="0" * 64), "samples.jsonl: missing, truncated or changed"),
        (PPL, scaled("metrics", "kl"), "field 'metrics.kl'"),
        (PPL, lambda r: r["metrics"].pop("kl"), "field 'metrics.kl'"),
        (PPL, scaled("metrics", "kl_p99"), "field 'metrics.kl_p99'"),
        (PPL, scaled("metrics", "kl_p999"), "field 'metrics.kl_p999'"),
        (PPL, scaled("metrics", "top1_agreement"), "field 'metrics.top1_agreement'"),
        (PPL, lambda r: r["metrics"].pop("kl_p999"), "field 'metrics.kl_p999'"),
        (PPL, put("metrics", "window", to=128.0), "field 'metrics.window'"),
        (PPL, put("protocol", to="A"), "field 'protocol'"),
        (LONG, scaled("metrics", "cut_share"), "field 'metrics.cut_share'"),
        (LONG, put("metrics", "rows_available", to=2.0), "field 'samples'"),
        (PERF, put("rep", to=1), "the file lies under '0'"),
        (PERF, put("device", to="other"), "the file lies under 'gpu'"),
        (PERF, put("workload", to="long"), "the file lies under 'short'"),
        (PERF, scaled("prefill_ratio"), "field 'prefill_ratio'"),
        (PERF, scaled("quantize_share"), "field 'quantize_share'"),
        (PERF, scaled("scheme_side", "prefill_ms", "median"), "scheme_side.prefill_ms.median"),
        (PERF, put("scheme_side", "decode_ms", "p10", to=9.0), "do not ascend"),
        (PERF, scaled("baseline_side", "decode_tokens_per_s"), "decode_tokens_per_s"),
        (PERF, scaled("scheme_side", "bits_per_element"), "scheme_side.bits_per_element"),
        (PERF, put("scheme_side", "status", to="oom"), "the status is oom"),
        (PERF, put("scheme_side", "scheme", to="kivi-4"), "field 'scheme_side.scheme'"),
        (PERF, put("baseline_side", "scheme", to="kivi-4"), "field 'baseline_side.scheme'"),
        (PERF, put("batch_size", to=3), "decode_tokens_per_s"),
        (PERF, put("environment", "gpus", to=[{}, {}]), "field 'environment.gpus': lists 2, but"),
        (ENERGY, put("environment", "gpus", to=[{}, {}]), "field 'environment.gpus': lists 2, but"),
        (ENERGY, scaled("energy_ratio"), "field 'energy_ratio'"),
        (ENERGY, scaled("scheme_side", "joules_per_token"), "scheme_side.joules_per_token"),
        (ENERGY, scaled("scheme_side", "joules", 0), "scheme_side.joules_above_idle"),
        (ENERGY, scaled("idle_watts"), "joules_above_idle"),
        (ENERGY, lambda r: r["scheme_side"]["seconds"].pop(), "not equally long"),
        (ENERGY, put("source", to="estimated"), "field 'source'"),
        (ENERGY, put("method", to="estimate, no counter was read"), "field 'source'"),
        (APPEND, lambda r: r["points"].pop(), "one of a series, chunk and size is missing"),
        (APPEND, put("points", 0, "tokens", to=65), "field 'points.tokens'"),
        (APPEND, put("head_dim", to=8), "field 'head_dim'"),
        (KERNELS, scaled("parts", 0, "copy_gb_per_s"), "copy_gb_per_s"),
        (KERNELS, scaled("parts", 0, "sides", 1, "copy_share"), "copy_share"),
        (KERNELS, scaled("parts", 0, "sides", 1, "floor_ms"), "floor_ms"),
        (KERNELS, scaled("parts", 0, "sides", 1, "ms", "median", by=0.5), "do not ascend"),
        (KERNELS, put("parts", 0, "measure", to="prefill"), "field 'parts.measure'"),
        (KERNELS, put("batch", to=2), "field 'batch'"),
        (KERNELS, put("case", to="two"), "the file lies under 'one'"),
    ],
)
def test_derived_fields_are_recomputed(
    study: Study, results: Path, name: str, change: Change, word: str
) -> None:
    sealed_again(results / name, change)
    told = refused(study, results)
    assert word in told
    assert all(Path(name).parent.name in line for line in told.splitlines())


@pytest.mark.fault(
    "records",
    "a repetition copied, also renumbered and sealed again",
    "refused; both files are named",
)
@pytest.mark.parametrize(
    "stage", ["perf/gpu/tiny/nuq3/short", "energy/gpu/tiny/nuq3/short", "append/gpu"]
)
def test_a_repetition_is_not_measured_by_copying_another(
    study: Study, results: Path, stage: str
) -> None:
    one, two = results / stage / "rep0.json", results / stage / "rep1.json"
    shutil.copy(one, two)
    assert "field 'rep': is '0', but the file lies under '1'" in refused(study, results)
    sealed_again(two, put("rep", to=1))
    told = refused(study, results)
    assert f"{two}: holds the measurements of {one}" in told and "\n" not in told


@pytest.mark.fault(
    "records",
    "the record of another scheme copied",
    "refused by name",
)
def test_a_scheme_is_not_measured_by_copying_another(study: Study, results: Path) -> None:
    shutil.rmtree(results / "eval/tiny/nuq3/ruler/seed0")
    shutil.copytree(results / "eval/tiny/fp16/ruler/seed0", results / "eval/tiny/nuq3/ruler/seed0")
    assert "nuq3/ruler/seed0/run.json: measured with another configuration" in refused(
        study, results
    )


def test_other_prompts_are_refused(study: Study, results: Path) -> None:
    def other(raw: dict[str, Any]) -> None:
        raw["prompts_sha256"] = raw["inputs"]["prompts"] = "7" * 64

    sealed_again(results / EVAL, other)
    assert "field 'inputs.prompts': was measured with another prompts" in refused(study, results)
    sealed_again(results / EVAL, lambda raw: raw.update(inputs={}))
    assert "answers other prompts than" in refused(study, results)


@pytest.mark.fault(
    "records",
    "samples edited",
    "refused; file and line are named",
)
@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('"score": 0.0', '"score": "0"', "missing, truncated or changed"),
        ('"score": ', '"scores": ', "missing, truncated or changed"),
    ],
)
def test_samples_are_those_of_the_record(
    study: Study, results: Path, old: str, new: str, word: str
) -> None:
    lines = (results / EVAL).with_name("samples.jsonl")
    lines.write_text(lines.read_text().replace(old, new, 1))
    told = refused(study, results)
    assert word in told and str(lines) in told


@pytest.mark.fault(
    "records",
    "samples of a wrong form with a right hash",
    "refused; file and line are named",
)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (put("score", to="1.0"), "line 2: field 'score'"),
        (put("score", to=2.0), "line 2: field 'score'"),
        (put("score", to=float("nan")), "line 2: NaN is not a number"),
        (put("index", to=0), "line 2: field 'index': is 0, not 1"),
        (put("more", to=0), "line 2: field 'more'"),
        (lambda row: row.pop("answer"), "line 2: field 'answer'"),
        (put("key", to=1.5), "line 2: field 'key'"),
    ],
)
def test_samples_are_strict_also_with_a_right_hash(
    study: Study, results: Path, change: Change, word: str
) -> None:
    file = (results / EVAL).with_name("samples.jsonl")
    lines = file.read_text().split("\n")
    row = json.loads(lines[1])
    change(row)
    lines[1] = json.dumps(row)
    file.write_text("\n".join(lines))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sealed_again(results / EVAL, put("samples_sha256", to=digest))
    assert word in refused(study, results)


def with_samples(file: Path, change: Callable[[list[dict[str, Any]]], Any], **metrics: Any) -> None:
    """Edits a record's samples and gives the record their hash, and its metrics other values."""
    lines = file.with_name("samples.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    change(rows)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digest = hashlib.sha256(lines.read_bytes()).hexdigest()

    def again(raw: dict[str, Any]) -> None:
        raw["samples_sha256"] = digest
        raw["metrics"] |= metrics
        raw["metrics"] = {k: v for k, v in raw["metrics"].items() if v is not None}

    sealed_again(file, again)


TAILS: dict[str, Any] = dict.fromkeys(("kl_p99", "kl_p999", "top1_agreement"))


def without_tails(rows: list[dict[str, Any]]) -> None:
    """Leaves what samples held before there were percentiles and top-1 agreement."""
    for row in rows:
        del row["kl_tail"], row["top1_agreed"]


def test_a_record_from_before_there_were_percentiles_is_collected(
    study: Study, results: Path
) -> None:
    with_samples(results / PPL, without_tails, **TAILS)
    table = collect(study, results, DEVICE)["eval"]
    table = table[(table.task == "ppl") & (table.scheme == "kivi-4")].set_index("seed")
    assert table.kl.notna().all()
    for name in TAILS:
        assert table[name].notna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without_tails, "field 'metrics.kl_p99': the samples have none"),
        (lambda rows: rows[0].pop("top1_agreed"), "field 'metrics.top1_agreement': the samples"),
        (lambda rows: rows[0].update(kl=None), "field 'metrics.kl': the samples have none"),
        (lambda rows: rows[0].update(top1_agreed=64), "field 'metrics.top1_agreement'"),
        (lambda rows: rows[1]["kl_tail"].append(0.1), "field 'kl_tail': the samples hold 4"),
        (lambda rows: next(r["kl_tail"] for r in rows if r["kl_tail"]).pop(), "are too few"),
        (put(0, "kl", to=60.0), "field 'metrics.kl'"),
        (put(0, "kl_tail", to=[0.0] * 60), "field 'metrics.kl_p99': is"),
        (put(0, "kl_tail", 0, to="x"), "field 'kl_tail.0'"),
    ],
)
def test_the_largest_divergences_are_those_of_the_record(
    study: Study, results: Path, change: Callable[[Any], Any], word: str
) -> None:
    # a known window has some of the largest divergences
    with_samples(results / PPL, lambda rows: rows.sort(key=lambda r: -len(r["kl_tail"])))
    with_samples(
        results / PPL,
        lambda rows: [r.update(index=i, start=64 * i) for i, r in enumerate(rows)],
    )
    with_samples(results / PPL, change)
    told = refused(study, results)
    assert word in told and "\n" not in told


def rows_of(tails: list[list[float]], **changed: Any) -> list[dict[str, Any]]:
    """Windows of 50 tokens with the same sums and some of the largest divergences each."""
    same = {"tokens": 50, "nll": 90.0, "kl": 5.0, "top1_agreed": 40}
    return [
        {"index": i, "start": 60 * i, **same, "kl_tail": tail} | (changed if i == 0 else {})
        for i, tail in enumerate(tails)
    ]


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (rows_of([[2.0], [1.0]], top1_agreed=51), "more than the window's tokens"),
        (rows_of([[2.0], [1.0]], top1_agreed=None), "some samples have no 'top1_agreed'"),
        (rows_of([[2.0], [1.0]], kl=None), "some samples have no 'kl'"),
        (rows_of([[1.0, 2.0], []]), "do not descend"),
        (rows_of([[2.0], [1.0]], kl=1.9), "field 'kl': is 1.9, which"),
        (rows_of([[2.0], [0.01]], kl=2.6), "field 'kl': is 2.6, which"),
        (rows_of([[2.0, 1.0], [0.5]]), "hold 3 values, not 2"),
    ],
)
def test_windows_contradict_their_largest_divergences(
    rows: list[dict[str, Any]], word: str
) -> None:
    check_windows({}, rows_of([[2.0], [1.0]]))
    check_windows({}, rows_of([[2.0, 1.0], []]))
    with pytest.raises(ValueError, match=re.escape(word)):
        check_windows({}, rows)


def test_doubled_keys_are_refused(study: Study, results: Path) -> None:
    file = results / EVAL
    file.write_text(file.read_text().replace('"kind"', '"value": 100.0,\n  "kind"'))
    assert "key 'value' is given twice" in refused(study, results)


@pytest.mark.parametrize("what", ["folder", "link", "bytes", "parent"])
def test_what_is_no_record_is_named_also_in_an_unfinished_study(
    study: Study, results: Path, what: str
) -> None:
    file = results / EVAL
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "link":
        file.symlink_to("nowhere")
    elif what == "bytes":
        file.write_bytes(b"\xff\xfe{}")
    else:
        shutil.rmtree(file.parent)
        file.parent.write_text("a file")
    problems = Problems(present=True)
    with pytest.raises(UserError) as error:
        collect(study, results, DEVICE, problems)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_all_sample_rows_are_parsed() -> None:
    """What the suites write is what is read (their own tests hold the real ones against it)."""
    import numpy as np

    from kvquant.study.samples import parse_samples
    from kvquant.study.tasks import SUITES

    for suite in SUITES:
        rows = sample_rows(suite, np.random.default_rng(0), 3)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        assert parse_samples(text, suite) == rows
