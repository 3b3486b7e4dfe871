"""Peers in a study: built, evaluated, timed and collected through the verbs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.quantization.nuq import fit
from kvquant.quantization.quantizer_file import load_quantizer
from kvquant.study.config import parse_study
from kvquant.study.records import EvalRecord, ThroughputRecord, read_record
from tests.support.pipeline import measured_folder

QUANTO = importlib.util.find_spec("optimum") is not None
PEERS: dict[str, Any] = {
    "nf3-1pct": {"kind": "nuq", "bits": 3, "block_size": 32, "datatype": "nf"},
    "ref3-1pct": {"kind": "kvquant-ref", "bits": 3},
    "turboquant-3": {"kind": "turboquant", "bits": 3, "block_size": 32},
    "block-gtq-3": {"kind": "block-gtq", "bits": 3, "block_size": 32},
    "wush-kv-3": {"kind": "wush-kv", "bits": 3, "sinks": 1, "residual": 0},
    "cq-2c4b": {"kind": "cq", "bits": 2.0, "channels": 2, "block_size": 32, "samples": 256},
    "nuq3-after-rope": {"kind": "nuq", "bits": 3, "block_size": 32, "keys": "after-rope"},
    "fp16-static": {"kind": "fp16-static"},
}
CALIBRATED = (
    "nuq3-1pct", "nf3-1pct", "ref3-1pct", "block-gtq-3", "wush-kv-3", "cq-2c4b", "nuq3-after-rope",
)  # fmt: skip
# What is refused where statistics lack what a scheme is built from.
LACKING = {
    "cq-2c4b": "schemes.cq-2c4b.samples: 254 whole tokens",
    "nuq3-after-rope": "schemes.nuq3-after-rope.keys: after-rope needs histograms of keys",
}
if QUANTO:
    PEERS["hf-quanto-4"] = {"kind": "hf-quanto", "bits": 4, "group": 16, "residual": 16}
EVALUATED = ["fp16", "nuq3-1pct", *(p for p in PEERS if p != "fp16-static")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of which the shared stages have run."""
    return measured_folder(tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def study(work: Path) -> dict[str, Any]:
    """The pipeline's study with peers; written to peers.json, quantizers built."""
    raw = json.loads((work / "study.json").read_text())
    raw["schemes"] |= PEERS
    raw["evaluation"] = {"schemes": EVALUATED}
    raw["throughput"]["schemes"] = [*PEERS, "nuq3-1pct"]
    raw["energy"]["schemes"] = []
    raw["energy"]["workloads"] = {}
    raw["tasks"].pop("passkey")
    raw.pop("append", None)
    raw.pop("kernels", None)
    raw["seeds"] = [0, 1]
    raw["pathvars"] = {"results": str(work / "p")}
    (work / "peers.json").write_text(json.dumps(raw))
    base = ["--study", str(work / "peers.json"), "--model", "tiny"]
    read = ["--model-manifest", str(work / "model.json"), "--device", "cpu"]
    read += ["--data-manifest", str(work / "data.json")]
    stats = str(work / "p/calib/stats.safetensors")
    assert main(["calibrate", *base, *read, "--out", stats]) == 0
    for scheme in CALIBRATED:
        out = ["--out", str(work / f"p/models/{scheme}/quantizer.json")]
        assert main(["quantize", *base, "--scheme", scheme, "--stats", stats, *out]) == 0
    return raw


@pytest.mark.fault(
    "custody",
    "statistics without the whole tokens or the keys after RoPE that a scheme is built from",
    "refused: calibrate again; they serve all other schemes",
)
def test_statistics_without_what_some_schemes_need_serve_all_others(
    work: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the same calibration that a study without such schemes has made."""
    older, newer = work / "r/calib/stats.json", work / "p/calib/stats.json"
    found = [json.loads(file.read_text()) for file in (older, newer)]
    assert "samples" not in found[0] and found[1]["samples"] == 254
    assert "roped_keys" not in found[0] and found[1]["roped_keys"] is True
    assert found[0]["spec_digest"] == found[1]["spec_digest"]
    words = ["quantize", "--study", str(work / "peers.json"), "--model", "tiny"]
    words += ["--stats", str(older.with_suffix(".safetensors"))]
    for scheme in CALIBRATED:
        out = ["--out", str(work / f"again/{scheme}/quantizer.json")]
        capsys.readouterr()
        assert (main([*words, "--scheme", scheme, *out]) == 0) == (scheme not in LACKING)
        told = capsys.readouterr().err
        if scheme in LACKING:
            assert len(told.splitlines()) == 1
            assert LACKING[scheme] in told and "calibrate again with this study" in told


def options(work: Path, scheme: str) -> list[str]:
    words = ["--study", str(work / "peers.json"), "--model", "tiny", "--scheme", scheme]
    words += ["--model-manifest", str(work / "model.json"), "--device", "cpu"]
    if scheme in CALIBRATED:
        words += ["--quantizer", str(work / f"p/models/{scheme}/quantizer.json")]
    return words


def test_nf_takes_ranges_from_calibration_and_levels_from_theory(
    work: Path,
    study: dict[str, Any],
) -> None:
    _, ours = load_quantizer(work / "p/models/nuq3-1pct/quantizer.json", weights_sha256=None)
    _, nf = load_quantizer(work / "p/models/nf3-1pct/quantizer.json", weights_sha256=None)
    for mine, theirs in zip(ours, nf, strict=True):
        assert isinstance(mine, LayerQuantizer) and isinstance(theirs, LayerQuantizer)
        assert torch.equal(mine.key_scale, theirs.key_scale)
        assert torch.equal(theirs.key_levels, fit("nf", 3))
        assert torch.equal(theirs.value_levels, fit("nf", 3))
        assert not torch.equal(mine.key_levels, theirs.key_levels)


def test_from_peers_to_tables(work: Path, study: dict[str, Any]) -> None:
    spec, results = parse_study(study), work / "p"
    assert ("hf-quanto-4", "ppl") not in spec.eval_cells()  # a task of protocol B
    assert ("hf-quanto-4", "ppl-a") in spec.eval_cells() or not QUANTO
    data = ["--data-manifest", str(work / "data.json"), "--seeds", "0", "1"]
    for scheme, task in spec.eval_cells():
        out = ["--out-dir", str(results / f"eval/tiny/{scheme}/{task}")]
        assert main(["evaluate", *options(work, scheme), "--task", task, *data, *out]) == 0
    values = {
        scheme: read_record(results / f"eval/tiny/{scheme}/ppl/seed0/run.json", EvalRecord).value
        for scheme in ("nuq3-1pct", "ref3-1pct")
    }
    assert values["ref3-1pct"] == pytest.approx(values["nuq3-1pct"], rel=1e-4)
    for scheme, workload, rep in spec.throughput_cells():
        words = [*options(work, scheme), "--device-name", "cpu", "--workload", workload]
        words += ["--data-manifest", str(work / "data.json")]
        record_file = results / f"perf/cpu/tiny/{scheme}/{workload}/rep{rep}.json"
        assert main(["throughput", *words, "--rep", str(rep), "--out", str(record_file)]) == 0
        record = read_record(record_file, ThroughputRecord)
        assert record.scheme_side.status == record.baseline_side.status == "ok"
        assert record.scheme_side.decode_ms is not None
        assert (record.quantize_share is None) == (scheme == "fp16-static")
    tables = ["--study", str(work / "peers.json")]
    collect = ["--results", str(results), "--device-name", "cpu"]
    out = ["--out-dir", str(results / "tables")]
    assert main(["aggregate", *tables, *collect, *out]) == 0
    tables += ["--tables", str(results / "tables")]
    for verb in ("statistics", "pareto"):
        assert main([verb, *tables, *out]) == 0
    for figure in ("pareto", "perplexity", "throughput"):
        file = str(results / f"{figure}.pdf")
        svg = str(results / f"{figure}.svg")
        assert main(["plot", *tables, "--figure", figure, "--out", file, svg]) == 0
    latex = ["--out", str(results / "claims.csv"), "--tex", str(results / "claims.tex")]
    assert main(["claims", *tables, *latex]) == 0
    (results / "tables/claims.csv").write_bytes((results / "claims.csv").read_bytes())
    latex = ["--out-dir", str(results / "t"), "--numbers", str(results / "t/numbers.tex")]
    assert main(["tables", *tables, *latex]) == 0
    assert "nan" not in (results / "t/summary.tex").read_text()
    pareto = pd.read_parquet(results / "tables/pareto.parquet").set_index("scheme")
    assert pareto.loc["fp16-static", ["bits_per_element", "perplexity"]].isna().all()
    assert pareto.loc["fp16-static", "prefill_ratio"] > 0


@pytest.mark.parametrize(
    ("schemes", "message"),
    [(["fp17"], "evaluation.schemes: 'fp17'"), (["kivi-2"], "the baseline 'fp16' is missing")],
)
def test_wrong_choices_are_refused(study: dict[str, Any], schemes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_study({**study, "evaluation": {"schemes": schemes}})
