"""Every verb, in the workflow's order, on a tiny model saved by the test."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from kvquant.cli import main
from kvquant.study.records import EvalRecord, ThroughputRecord, read_record
from tests.support.mutations import mutated
from tests.support.pipeline import evaluate, measured_folder, options


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of which the shared stages have run."""
    return measured_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.fault(
    "records",
    "100 random changes to the files of a study that was really measured",
    "none is accepted silently",
)
def test_from_records_to_claims(work: Path) -> None:
    results, device = work / "r", ["--device-name", "cpu"]
    for scheme in ("fp16", "nuq4-1pct", "nuq3-1pct", "kivi-2"):
        for task in ("ppl", "ppl-a", "passkey"):
            assert (
                evaluate(work, scheme, task, results / f"eval/tiny/{scheme}/{task}", 0, 1, 2) == 0
            )
    timed = [*options(work, "nuq3-1pct"), *device, "--rep", "0"]
    timed += ["--data-manifest", str(work / "data.json")]
    perf = results / "perf/cpu/tiny/nuq3-1pct/p64/rep0.json"
    energy = results / "energy/cpu/tiny/nuq3-1pct/p32/rep0.json"
    assert main(["throughput", *timed, "--workload", "p64", "--out", str(perf)]) == 0
    assert main(["energy", *timed, "--workload", "p32", "--out", str(energy)]) == 0
    study = ["--study", str(work / "study.json")]
    grown = ["--rep", "0", "--device", "cpu", "--out", str(results / "append/cpu/rep0.json")]
    assert main(["bench", "append", *study, *device, *grown]) == 0
    cases = ["--device", "cpu", "--out-dir", str(results / "kernels/cpu")]
    assert main(["bench", "kernels", *study, *device, *cases]) == 0
    record = read_record(perf, ThroughputRecord)
    assert record.prompt_tokens == 64 + 32
    assert record.scheme_side.prefill_ms is not None
    assert record.scheme_side.prefill_ms.n >= 5
    assert record.quantize_share is not None

    tables = str(results / "tables")
    collect = ["aggregate", *study, "--results", str(results), *device, "--out-dir", tables]
    assert main(collect) == 0
    first = (results / "tables/eval.csv").read_bytes()
    assert main(collect) == 0
    assert (results / "tables/eval.csv").read_bytes() == first
    for verb in ("statistics", "pareto"):
        assert main([verb, *study, "--tables", tables, "--out-dir", tables]) == 0
    for figure in ("pareto", "perplexity", "throughput", "append", "kernels"):
        out = work / f"paper/{figure}"
        words = ["plot", *study, "--tables", tables, "--figure", figure, "--out"]
        assert main([*words, f"{out}.pdf", f"{out}.svg"]) == 0
        assert Path(f"{out}.pdf").stat().st_size > 1000
    claims = ["--out", tables + "/claims.csv", "--tex", str(work / "paper/claims.tex")]
    assert main(["claims", *study, "--tables", tables, *claims]) == 0
    latex = ["--out-dir", str(work / "paper"), "--numbers", str(work / "paper/numbers.tex")]
    assert main(["tables", *study, "--tables", tables, *latex]) == 0
    assert r"\kvnumber{append.growth}" in (work / "paper/numbers.tex").read_text()
    assert r"\toprule" in (work / "paper/summary.tex").read_text()
    tests = pd.read_parquet(results / "tables/tests.parquet")
    assert len(tests) == 9
    assert set(pd.read_csv(results / "tables/claims.csv")["verdict"]) <= {
        "supported",
        "not supported",
        "not enough evidence",
        "not measured here",
    }

    # a truncated record is named, and nothing is collected from the rest
    broken = results / "eval/tiny/fp16/ppl/seed0/run.json"
    whole = broken.read_text()
    broken.write_text(whole[:100])
    assert main(collect) == 2
    broken.write_text(whole)
    # schemes are compared on the same prompts or not at all
    other_prompts = results / "eval/tiny/kivi-2/passkey/seed1/run.json"
    whole = other_prompts.read_text()
    facts = json.loads(whole)
    assert len(facts["prompts_sha256"]) == 64
    other_prompts.write_text(json.dumps({**facts, "prompts_sha256": "0" * 64}))
    assert main(collect) == 2
    other_prompts.write_text(whole)
    changed = json.loads((work / "study.json").read_text())
    changed["tasks"]["ppl"]["window"] = 64
    (work / "other.json").write_text(json.dumps(changed))
    other = [str(work / "other.json") if w == str(work / "study.json") else w for w in collect]
    assert main(other) == 2
    # nor is any other change to what was measured accepted
    names = ("eval", "perf", "energy", "append", "kernels")
    measured = [f for name in names for f in sorted((results / name).rglob("*.json*"))]
    rng = random.Random(0)
    for _ in range(100):
        broken = rng.choice(measured)
        kept = broken.read_bytes()
        broken.write_bytes(mutated(broken, rng))
        if main(collect) != 2:  # the form of the file changed, not its content
            assert (results / "tables/eval.csv").read_bytes() == first
            content = [json.loads(text) for text in (broken.read_bytes(), kept)]
            assert content[0] == content[1]
        broken.write_bytes(kept)
    assert main(collect) == 0


def test_bits_come_from_bytes(work: Path) -> None:
    bits = {}
    for scheme in ("fp16", "nuq4-1pct", "nuq3-1pct"):
        out = work / "r" / f"eval/tiny/{scheme}/passkey"
        if not (out / "seed0/run.json").is_file():
            assert evaluate(work, scheme, "passkey", out, 0) == 0
        record = read_record(out / "seed0/run.json", EvalRecord)
        assert record.bits_per_element == 8 * record.cache_bytes / record.cache_elements
        bits[scheme] = record.bits_per_element
    assert bits["nuq3-1pct"] < bits["nuq4-1pct"] < bits["fp16"]


def test_a_killed_job_resumes_with_equal_results(work: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert evaluate(work, "nuq3-1pct", "ppl", first, 0, 1) == 0
    kept = sorted((work / "resume").rglob("*"))
    assert kept
    assert evaluate(work, "nuq3-1pct", "ppl", again, 1, 0, 2) == 0
    for seed in (0, 1):
        for name in ("run.json", "samples.jsonl"):
            file = f"seed{seed}/{name}"
            assert (again / file).read_bytes() == (first / file).read_bytes()
    # without the resume folder the measurement itself gives the same samples
    shutil.rmtree(work / "resume")
    fresh = tmp_path / "fresh"
    assert evaluate(work, "nuq3-1pct", "ppl", fresh, 0) == 0
    rows = (fresh / "seed0/samples.jsonl").read_bytes()
    assert rows == (first / "seed0/samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheme", "nuq5-1pct"], "unknown scheme 'nuq5-1pct': did you mean"),
        (["--task", "passky"], "unknown task 'passky': did you mean passkey"),
        (["--model", "tinny"], "unknown model 'tinny': did you mean tiny"),
        (["--seeds", "-1"], "--seeds"),
        (["--quantizer", "/no/such/quantizer.json"], "quantizer: no such file"),
        (["--model-manifest", "/no/such/model.json"], "--model-manifest: no such file"),
    ],
)
def test_bad_input_is_one_line(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    base = ["evaluate", *options(work, "nuq3-1pct"), "--task", "ppl", "--seeds", "0"]
    base += ["--data-manifest", str(work / "data.json"), "--out-dir", str(tmp_path)]
    assert main([*base, *words]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("kvquant: error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.rglob("run.json"))


def test_quantizer_of_another_model_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads((work / "model.json").read_text())
    other["weights_sha256"] = "0" * 64
    (work / "foreign.json").write_text(json.dumps(other))
    words = ["evaluate", *options(work, "nuq3-1pct"), "--task", "ppl", "--seeds", "0"]
    words += ["--data-manifest", str(work / "data.json"), "--out-dir", str(tmp_path)]
    assert main([*words, "--model-manifest", str(work / "foreign.json")]) == 2
    assert "was built for model 'tiny'" in capsys.readouterr().err


def test_wrong_device_name_is_refused(work: Path, tmp_path: Path) -> None:
    words = ["throughput", *options(work, "nuq3-1pct"), "--workload", "p64", "--rep", "0"]
    words += ["--data-manifest", str(work / "data.json")]
    out = tmp_path / "rep0.json"
    assert main([*words, "--device-name", "h100-80gb-hbm3", "--out", str(out)]) == 2
    assert not out.exists()


def test_empty_prompt_is_refused(work: Path) -> None:
    from kvquant.errors import UserError
    from kvquant.models.generation import greedy
    from kvquant.models.loading import load_quantized_model

    qm = load_quantized_model(work / "hf", device="cpu")
    with pytest.raises(UserError, match="prompt 1: is empty"):
        greedy(qm, [[1], []], 2, batch_size=2)
    alone = greedy(qm, [[5, 6, 7]], 6, batch_size=1, eos_ids=[]).tokens[0]
    batch = greedy(qm, [[9] * 30, [5, 6, 7]], 6, batch_size=2, eos_ids=[]).tokens[1]
    assert alone == batch
    assert torch.get_num_threads() >= 1
