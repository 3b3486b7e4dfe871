"""The verb evaluate: seeds are independent, finished ones are reused, damaged ones are told.

Also covers: evaluation.base, evaluation.registry.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.evaluation import registry, run
from kvquant.evaluation.prompts import make_prompts
from kvquant.evaluation.run import evaluate
from kvquant.models import prompt_attention
from kvquant.study.config import Study, parse_study
from kvquant.study.digests import eval_digest, prompts_digest
from kvquant.study.publish import publish
from kvquant.study.records import EvalRecord, read_record, write_record
from tests.evaluation.asking import passkey_study


@pytest.fixture
def study(tiny_dir: Path) -> Study:
    return parse_study(passkey_study(tiny_dir))


def asked(study: Study, manifest: Path, seeds: list[int], task: str = "passkey") -> Path:
    """The file of prompts of some seeds, made beside the manifest."""
    name = f"{prompts_digest(study, 'tiny', task)}-{'-'.join(map(str, sorted(seeds)))}.jsonl.gz"
    file = manifest.parent / name
    if not file.is_file():
        make_prompts(study, "tiny", task, seeds, model_manifest=manifest, out=file)
    return file


def measure(study: Study, manifest: Path, out: Path, seeds: list[int], **more: Any) -> Any:
    prompts = asked(study, manifest, seeds)
    settings: dict[str, Any] = {"model_manifest": manifest, "out_dir": out, "device": "cpu"}
    settings |= {"prompts": prompts, **more}
    return evaluate(study, "tiny", settings.pop("scheme", "kivi-4"), "passkey", seeds, **settings)


def content(out: Path, seed: int) -> tuple[str, dict[str, Any]]:
    """Samples, and the record without what differs between two measurements."""
    folder = out / f"seed{seed}"
    record = json.loads((folder / "run.json").read_text())
    for name in ("seconds", "seal"):
        record.pop(name)
    return (folder / "samples.jsonl").read_text(), record


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds that were really measured."""
    seen: list[int] = []
    plain = registry.run_suite

    def counting(context: Any, spec: Any, seeds: list[int], *prompts: Any) -> Any:
        seen.extend(seeds)
        return plain(context, spec, seeds, *prompts)

    monkeypatch.setattr(registry, "run_suite", counting)
    return seen


def test_writes_a_checked_record_a_seed(study: Study, manifest: Path, tmp_path: Path) -> None:
    measure(study, manifest, tmp_path, [0, 2])
    for seed in (0, 2):
        record = read_record(tmp_path / f"seed{seed}" / "run.json", EvalRecord)
        assert record.seed == seed and record.suite == "passkey" and record.samples == 2
        assert record.spec_digest == eval_digest(study, "tiny", "kivi-4", "passkey", seed)
        assert record.bits_per_element == 8 * record.cache_bytes / record.cache_elements
        assert 4 < record.bits_per_element < 16
        assert record.environment["packages"]["torch"]
        assert record.inputs["prompts"] == record.prompts_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed0", "seed2"]


def test_prompts_attend_in_8_bits_where_the_scheme_says_so(
    tiny_dir: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = passkey_study(tiny_dir)
    raw["schemes"]["eight"] = {**raw["schemes"]["kivi-4"], "prompt_attention": "8-bit"}
    raw["tasks"]["ppl"]["window"] = 128
    columns: list[int] = []
    plain = prompt_attention.attend

    def noted(queries: Any, *rest: Any, **options: Any) -> Any:
        columns.append(queries.shape[2])
        return plain(queries, *rest, **options)

    monkeypatch.setattr(prompt_attention, "attend", noted)
    for scheme, bits in (("kivi-4", "16-bit"), ("eight", "8-bit")):
        out = tmp_path / scheme
        measure(parse_study(raw), manifest, out, [0], scheme=scheme)
        record = read_record(out / "seed0" / "run.json", EvalRecord)
        assert record.prompt_attention == bits and record.protocol == "A"
        assert bool(columns) is (bits == "8-bit")
    assert min(columns) >= 128


def test_a_killed_job_goes_on_and_ends_the_same(
    study: Study, manifest: Path, tmp_path: Path, counted: list[int]
) -> None:
    whole, killed, resume = tmp_path / "whole", tmp_path / "killed", tmp_path / "resume"
    measure(study, manifest, whole, [2, 0, 1])
    counted.clear()
    measure(study, manifest, killed, [0], resume_dir=resume)
    # Killed here: the workflow takes the job's outputs away, the resume folder stays; a seed under
    # way had written its samples but no record.
    for file in (killed / "seed0").iterdir():
        file.unlink()
    half = resume / eval_digest(study, "tiny", "kivi-4", "passkey", 1)
    half.mkdir()
    (half / "samples.jsonl").write_text('{"half": ')
    measure(study, manifest, killed, [0, 1, 2], resume_dir=resume)
    assert counted == [0, 1, 2]
    for seed in range(3):
        assert content(killed, seed) == content(whole, seed)
    measure(study, manifest, killed, [0, 1, 2], resume_dir=resume)
    assert counted == [0, 1, 2]


@pytest.mark.parametrize("scheme", ["fp16", "kivi-4"])
def test_seeds_that_share_batches_have_the_same_answers(
    tiny_dir: Path, manifest: Path, tmp_path: Path, counted: list[int], scheme: str
) -> None:
    def rows(batch_size: int, seeds: list[int]) -> list[str]:
        study = parse_study(passkey_study(tiny_dir, batch_size=batch_size))
        out = tmp_path / f"{batch_size}-{len(seeds)}"
        measure(study, manifest, out, seeds, scheme=scheme)
        found = [content(out, seed) for seed in seeds]
        # 3 seeds of 2 prompts: a seed reports its own samples, tokens and elements
        assert all(record["samples"] == 2 for _, record in found)
        assert all(8 * r["cache_bytes"] / r["cache_elements"] > 15 for _, r in found) == (
            scheme == "fp16"
        )
        return [f"{samples} {record['value']} {record['tokens']}" for samples, record in found]

    alone = rows(1, [0, 1, 2])
    assert rows(6, [0, 1, 2]) == alone
    assert rows(4, [0, 1, 2]) == alone  # two seeds, then one
    assert rows(6, [1, 2]) == alone[1:]
    assert counted == [0, 1, 2] * 3 + [1, 2]


def test_damaged_resume_is_told_and_measured_anew(
    study: Study,
    manifest: Path,
    tmp_path: Path,
    counted: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    resume = tmp_path / "resume"
    measure(study, manifest, tmp_path / "a", [0, 1], resume_dir=resume)
    record = resume / eval_digest(study, "tiny", "kivi-4", "passkey", 0) / "run.json"
    record.write_text(record.read_text()[:100])
    samples = resume / eval_digest(study, "tiny", "kivi-4", "passkey", 1) / "samples.jsonl"
    samples.write_text(samples.read_text() + "\n")
    counted.clear()
    measure(study, manifest, tmp_path / "b", [0, 1], resume_dir=resume)
    assert counted == [0, 1]
    told = capsys.readouterr().err
    assert "truncated or damaged JSON" in told and "sha256 differs" in told
    for seed in (0, 1):
        assert content(tmp_path / "b", seed) == content(tmp_path / "a", seed)


@pytest.mark.fault(
    "records",
    "eight kinds of damage to a resume file",
    "reported, removed, measured once again",
)
@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("value", "was changed after it was written"),
        ("bytes", "is not UTF-8"),
        ("folder", "a folder, not a file"),
        ("link", "a link to nothing"),
        ("samples-folder", "a folder, not a file"),
        ("samples-bytes", "is not UTF-8"),
        ("old", "kvquant seal"),
        ("place", "a file stands where a folder of its path should be"),
    ],
)
def test_no_damage_to_a_resume_file_ends_a_job(
    study: Study,
    manifest: Path,
    tmp_path: Path,
    counted: list[int],
    capsys: pytest.CaptureFixture[str],
    what: str,
    word: str,
) -> None:
    resume = tmp_path / "resume"
    measure(study, manifest, tmp_path / "a", [0], resume_dir=resume)
    place = resume / eval_digest(study, "tiny", "kivi-4", "passkey", 0)
    file = place / ("samples.jsonl" if what.startswith("samples") else "run.json")
    raw, record = file.read_bytes(), read_record(place / "run.json", EvalRecord)
    file.unlink()
    if what == "value":
        file.write_bytes(raw.replace(b'"value": ', b'"value": 1'))
    elif what == "old":
        plain = json.loads(record.model_dump_json(exclude={"seal", "inputs"}))
        file.write_text(json.dumps(plain | {"schema_version": 1}))
    elif what.endswith("bytes"):
        file.write_bytes(raw[:40] + b"\xff" + raw[40:])
    elif what.endswith("folder"):
        file.mkdir()
        (file / "more").write_text("x")
    elif what == "link":
        file.symlink_to("nowhere")
    else:
        shutil.rmtree(place)
        place.write_text("x")
    counted.clear()
    for out in ("b", "c"):  # measured once again, then kept
        measure(study, manifest, tmp_path / out, [0], resume_dir=resume)
        assert content(tmp_path / out, 0) == content(tmp_path / "a", 0)
    assert counted == [0]
    assert word in capsys.readouterr().err


@pytest.mark.fault(
    "records",
    "a finished seed that was measured with other weights",
    "refused; in the resume folder measured again",
)
def test_a_seed_measured_with_other_weights_is_not_taken(
    study: Study, manifest: Path, tmp_path: Path, counted: list[int]
) -> None:
    resume, out = tmp_path / "resume", tmp_path / "a"
    measure(study, manifest, out, [0], resume_dir=resume)
    place = resume / eval_digest(study, "tiny", "kivi-4", "passkey", 0)
    for file in (place / "run.json", out / "seed0/run.json"):
        record = read_record(file, EvalRecord)
        file.unlink()
        inputs = record.inputs | {"model": "0" * 64}
        write_record(file, record.model_copy(update={"inputs": inputs}))
    with pytest.raises(UserError, match="was measured with another model than the one given"):
        measure(study, manifest, out, [0], resume_dir=resume)
    counted.clear()
    measure(study, manifest, tmp_path / "b", [0], resume_dir=resume)
    assert counted == [0]


@pytest.mark.fault(
    "records",
    "samples that a killed job left without a record",
    "replaced",
)
def test_samples_of_a_killed_job_are_replaced(study: Study, manifest: Path, tmp_path: Path) -> None:
    resume = tmp_path / "resume"
    measure(study, manifest, tmp_path / "a", [0], resume_dir=resume)
    (tmp_path / "b/seed0").mkdir(parents=True)
    (tmp_path / "b/seed0/samples.jsonl").write_text('{"half": ')
    measure(study, manifest, tmp_path / "b", [0], resume_dir=resume)
    assert content(tmp_path / "b", 0) == content(tmp_path / "a", 0)


def test_damaged_results_are_not_overwritten(study: Study, manifest: Path, tmp_path: Path) -> None:
    measure(study, manifest, tmp_path, [0])
    file = tmp_path / "seed0" / "run.json"
    good = file.read_text()
    file.write_text(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"truncated or damaged JSON.*delete it by name"):
        measure(study, manifest, tmp_path, [0])
    file.write_text(good)
    with pytest.raises(UserError, match="another specification"):
        measure(study, manifest, tmp_path, [0], scheme="fp16")
    (tmp_path / "seed0" / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match=r"samples\.jsonl: missing, truncated or changed"):
        measure(study, manifest, tmp_path, [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "kivi-5"], "unknown scheme 'kivi-5': did you mean kivi-4"),
        (["--task", "passky"], "unknown task 'passky': did you mean passkey"),
        (["--model", "tinny"], "unknown model 'tinny'"),
        (["--scheme", "nuq3"], "--quantizer: scheme 'nuq3' needs"),
        (["--task", "long"], "holds the prompts of another specification"),
        (["--task", "ppl"], "--prompts: task 'ppl' reads a text and has no prompts"),
        (["--prompts", "none.jsonl.gz"], "--prompts: no such file: none.jsonl.gz"),
        (["--seeds", "0", "7"], "holds no prompts of seed 7, only of 0"),
        (["--model-manifest", "none.json"], "--model-manifest: no such file"),
        (["--seeds", "1", "1"], "--seeds: must be distinct"),
        (["--seeds", "-1"], "--seeds"),
    ],
)
def test_bad_input_is_one_line(
    tiny_dir: Path,
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(passkey_study(tiny_dir)))
    words = ["evaluate", "--study", str(file), "--model", "tiny", "--scheme", "fp16"]
    words += ["--task", "passkey", "--seeds", "0", "--model-manifest", str(manifest)]
    words += ["--prompts", str(asked(parse_study(passkey_study(tiny_dir)), manifest, [0]))]
    words += ["--device", "cpu", "--out-dir", str(tmp_path / "out"), *options]
    assert main(words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and told[-1].startswith("kvquant: error: ")
    assert not list(tmp_path.glob("out/seed*/run.json"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("passkey", "--prompts: task 'passkey' needs the file of its prompts (run prompts)"),
        ("ppl", "--data-manifest: task 'ppl' reads 'essays'"),
    ],
)
def test_a_missing_input_is_named(
    study: Study, manifest: Path, tmp_path: Path, task: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        evaluate(study, "tiny", "fp16", task, [0], model_manifest=manifest, out_dir=tmp_path)
    assert message in str(error.value)


def test_finished_seeds_need_no_model(
    study: Study, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(study, manifest, tmp_path, [0])
    monkeypatch.setattr(run, "_loader", lambda *args: pytest.fail("the model was loaded"))
    assert measure(study, manifest, tmp_path, [0])[0].seed == 0


def test_published_seeds_are_not_measured_again(
    study: Study, manifest: Path, tmp_path: Path, counted: list[int]
) -> None:
    first = tmp_path / "first/eval/tiny/kivi-4/passkey"
    measure(study, manifest, first, [0, 1])
    publish(tmp_path / "first", tmp_path / "archive")
    study = study.model_copy(update={"published": str(tmp_path / "archive")})
    counted.clear()
    out = tmp_path / "second"
    measure(study, manifest, out, [0, 1, 2])
    assert counted == [2]
    for seed in (0, 1):
        for name in ("run.json", "samples.jsonl"):
            written = (out / f"seed{seed}" / name).read_bytes()
            assert written == (first / f"seed{seed}" / name).read_bytes()
