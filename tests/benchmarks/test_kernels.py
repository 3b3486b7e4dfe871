"""`kvquant bench kernels`: records, resuming, what is refused; on a CPU with a tiny shape.

Also covers: benchmarks.bench, benchmarks.kernel_measures, benchmarks.random_model, study.kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.benchmarks import kernels
from kvquant.benchmarks.kernel_measures import Bench, Prompts, continuation, prompt_lengths
from kvquant.benchmarks.kernels import order
from kvquant.benchmarks.random_model import RandomModel
from kvquant.cli import main
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.schemes import hf_quantized
from kvquant.study.config import Study, parse_study
from kvquant.study.digests import kernels_digest
from kvquant.study.kernels import KernelCase
from kvquant.study.records import KernelRecord, read_record
from tests.support.rope import rope, rotate

CPU = torch.device("cpu")
FIRST = {
    "shape": "tiny",
    "batch": 2,
    "tokens": 64,
    "ragged": True,
    "measure": ["pack", "prefill", "layer-step"],
    "peers": ["kivi-4", "ref3", "hf-quanto-4"],
}
SECOND = {"shape": "tiny", "tokens": 32, "measure": ["pack"]}


def study(cases: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    return {
        "study": "tiny",
        "device": "cpu",
        "models": {"tiny": {"source": "local", "path": "unused"}},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "nuq3-1pct": {"kind": "nuq", "bits": 3, "block_size": 32},
            "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 16},
            "ref3": {"kind": "kvquant-ref", "bits": 3},
            "hf-quanto-4": {"kind": "hf-quanto", "bits": 4},
        },
        "tasks": {"passkey": {"suite": "passkey"}},
        "kernels": {
            "cases": cases or {"first": FIRST, "second": SECOND},
            "rounds": 5,
            "max_seconds": 0.1,
            **section,
        },
    }


def command(folder: Path, raw: dict[str, Any], *more: str, device_name: str = "cpu") -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(raw))
    words = ["bench", "kernels", "--study", str(folder / "study.json"), "--device", "cpu"]
    return [*words, "--device-name", device_name, "--out-dir", str(folder / "out"), *more]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both cases are measured; quanto counts as not installed."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_quantized, "_installed", lambda module: False)
        assert main(command(folder, study())) == 0
    return folder


def test_record_of_every_case(done: Path) -> None:
    first = read_record(done / "out/first.json", KernelRecord)
    assert (first.case, first.shape, first.scheme) == ("first", "tiny", "nuq3-1pct")
    assert (first.batch, first.tokens, first.all_tokens) == (2, 64, 96)
    assert first.spec_digest == kernels_digest(parse_study(study()), "first")
    parts = {part.measure: part for part in first.parts}
    assert list(parts) == ["pack", "prefill", "layer-step"]
    for what in ("prefill", "layer-step"):
        sides = {side.side: side for side in parts[what].sides}
        assert list(sides) == ["fp16", "nuq3-1pct", "kivi-4", "ref3", "hf-quanto-4"]
        assert sides["hf-quanto-4"].status == "not installed"
        assert "pip install optimum-quanto" in sides["hf-quanto-4"].reason
        for name in ("fp16", "nuq3-1pct", "kivi-4", "ref3"):
            side = sides[name]
            assert side.status == "ok" and side.ms is not None and side.ms.n == 5
            assert side.cache_bytes is not None and side.bits_per_element is not None
            assert (side.over_ours is None) == (side.role == "ours")
        # fp16 stores padding too: 2 x 64 columns for 96 tokens
        assert sides["fp16"].bits_per_element == pytest.approx(16 * 128 / 96)
        layers = 2 if what == "prefill" else 1
        assert sides["fp16"].cache_bytes == layers * 2 * 2 * 64 * 64 * 2
    second = read_record(done / "out/second.json", KernelRecord)
    assert [part.measure for part in second.parts] == ["pack"]


def test_pack_has_a_floor_by_bytes(done: Path) -> None:
    part = read_record(done / "out/second.json", KernelRecord).parts[0]
    copied, ours = part.sides
    assert (copied.role, ours.role) == ("copy", "ours")
    assert copied.nbytes == 2 * 2 * 32 * 64 * 2  # read and written: K and V, 16 bits
    assert copied.copy_share == pytest.approx(1.0)
    assert part.copy_gb_per_s == copied.gb_per_s
    assert ours.ms is not None and ours.nbytes is not None and ours.floor_ms is not None
    assert copied.nbytes / 2 < ours.nbytes < copied.nbytes
    assert ours.gb_per_s == pytest.approx(ours.nbytes / ours.ms.median / 1e6)
    assert ours.copy_share == pytest.approx(ours.floor_ms / ours.ms.median)
    assert ours.slots_per_element is None  # a CPU has no such number


def test_finished_cases_are_kept(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run measures nothing; another one only what is missing."""
    text = {name: (done / f"out/{name}.json").read_bytes() for name in ("first", "second")}
    plain = kernels.measure
    asked: list[str] = []

    def counted(bench: Bench, name: str, device: str) -> KernelRecord:
        asked.append(name)
        return plain(bench, name, device)

    monkeypatch.setattr(kernels, "measure", counted)
    assert main(command(done, study())) == 0
    assert "first on cpu" in capsys.readouterr().out and not asked
    for name, content in text.items():
        assert (done / f"out/{name}.json").read_bytes() == content

    words = command(tmp_path, study())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/first.json").write_bytes(text["first"])
    assert main(words) == 0
    assert asked == ["second"]
    assert (tmp_path / "out/first.json").read_bytes() == text["first"]


def test_a_case_that_fails_leaves_the_finished_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = kernels.measure

    def fails(bench: Bench, name: str, device: str) -> KernelRecord:
        if name == "b":
            raise RuntimeError("killed")
        return plain(bench, name, device)

    raw = study({"a": SECOND, "b": {**SECOND, "tokens": 64}})
    words = command(tmp_path, raw)
    monkeypatch.setattr(kernels, "measure", fails)
    with pytest.raises(RuntimeError):
        main(words)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["a.json"]


def test_another_configuration_is_not_overwritten(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "out/second.json").read_bytes()
    assert main(command(done, study(rounds=6))) == 2
    assert "measured with another configuration" in capsys.readouterr().err
    assert (done / "out/second.json").read_bytes() == before


@pytest.mark.parametrize(
    ("case", "section", "more", "message"),
    [
        ({"measure": ["steps"]}, {}, [], "kernels.cases.one.measure: 'steps' needs a GPU"),
        ({"measure": ["pack", "attention"]}, {}, [], "'attention' needs a GPU"),
        ({"measure": []}, {}, [], "kernels.cases.one.measure: List should have at least 1 item"),
        ({"measure": ["packing"]}, {}, [], "kernels.cases.one.measure.0: Input should be 'pack'"),
        ({"measure": ["pack", "pack"]}, {}, [], "measure: an entry is given twice"),
        ({"shape": "70b"}, {}, [], "kernels.cases.one.shape: Input should be '7b-mha'"),
        ({"tokens": 40}, {}, [], "kernels.cases.one.tokens: Input should be a multiple of 32"),
        ({"peers": ["kivi-4"]}, {}, [], "peers: measured in prefill and layer-step only"),
        (
            {"measure": ["prefill"], "peers": ["kivi-5"]},
            {},
            [],
            "kernels.cases.one.peers: 'kivi-5' is not among the schemes",
        ),
        (
            {"measure": ["prefill"], "peers": ["fp16"]},
            {},
            [],
            "kernels.cases.one.peers: 'fp16' is measured anyway",
        ),
        ({}, {"rounds": 4}, [], "kernels.rounds: Input should be greater than or equal to 5"),
        ({}, {}, ["--cases", "onne"], "unknown case 'onne': did you mean one?"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: dict[str, Any],
    section: dict[str, Any],
    more: list[str],
    message: str,
) -> None:
    assert main(command(tmp_path, study({"one": {**SECOND, **case}}, **section), *more)) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("kvquant: error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_what_no_case_can_be_measured_with_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = study()
    del raw["kernels"]
    assert main(command(tmp_path, raw)) == 2
    assert "kernels: this study has no such section" in capsys.readouterr().err
    assert main(command(tmp_path, {**study({"one": SECOND}), "headline": "kivi-4"})) == 2
    assert "scheme: 'kivi-4' has no kernels to be measured" in capsys.readouterr().err
    raw = study({"one": {**SECOND, "scheme": "other"}})
    assert main(command(tmp_path, raw)) == 2
    assert "kernels.cases.one.scheme: 'other' is not among the schemes" in capsys.readouterr().err
    assert main(command(tmp_path, study(), device_name="h100-80gb-hbm3")) == 2
    assert "--device-name: this is 'cpu'" in capsys.readouterr().err
    raw = study()
    raw["schemes"]["nuq3-1pct"]["block_size"] = 64
    assert main(command(tmp_path, raw, "--cases", "second")) == 2
    assert "32 is not a multiple of the block size 64" in capsys.readouterr().err


def test_a_case_may_name_its_scheme(tmp_path: Path) -> None:
    raw = study({"one": {**SECOND, "measure": ["pack"], "scheme": "allocated-3"}, "two": SECOND})
    raw["schemes"]["allocated-3"] = {"kind": "allocated", "block_size": 32}
    assert main(command(tmp_path, raw)) == 0
    record = read_record(tmp_path / "out/one.json", KernelRecord)
    assert record.scheme == "allocated-3"
    assert {side.side for side in record.parts[0].sides} == {"copy", "allocated-3"}
    assert read_record(tmp_path / "out/two.json", KernelRecord).scheme == "nuq3-1pct"
    plain = study({"two": SECOND})
    plain["schemes"] = raw["schemes"]
    mine, theirs = (kernels_digest(parse_study(s), "two") for s in (raw, plain))
    assert mine == theirs  # the headline's name is not written out


def test_cases_of_a_shape_stand_together_those_without_a_model_first() -> None:
    pack, whole = ["pack"], ["prefill"]
    cases = {
        "a": {"shape": "tiny", "tokens": 32, "measure": whole},
        "b": {"shape": "8b-gqa", "tokens": 32, "measure": whole},
        "c": {"shape": "tiny", "tokens": 32, "measure": pack},
        "d": {"shape": "8b-gqa", "tokens": 32, "measure": pack},
        "e": {"shape": "tiny", "tokens": 64, "measure": whole},
    }
    assert order(parse_study(study(cases)), list(cases)) == ["c", "a", "e", "d", "b"]


def test_a_model_serves_all_cases_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(parse_study(study()), CPU)
    assert bench.model("tiny") is bench.model("tiny")
    case = KernelCase.model_validate(SECOND)
    held = bench.model("tiny")
    bench.measure("pack", case)  # needs no model: its memory is free
    assert bench.model("tiny") is not held


@pytest.mark.parametrize("outliers", [0.02, 0.1])
def test_tables_leave_the_scheme_s_share_of_the_model_s_keys_outside(outliers: float) -> None:
    raw = study()
    raw["schemes"]["nuq3-1pct"]["outliers"] = outliers
    raw["calibration"] = {"outlier_fractions": [outliers, 0.01]}
    model = RandomModel("tiny", CPU)
    tables = model.tables(parse_study(raw).schemes["nuq3-1pct"])
    assert tables is not None and len(tables) == 2
    for keys, found in zip(model._sample(), tables, strict=True):
        assert isinstance(found, LayerQuantizer)
        scaled = (keys.view(-1, 1, 64) - found.key_zero) / found.key_scale
        assert (scaled.abs() > 1).float().mean() == pytest.approx(outliers, rel=0.1)
    assert model.tables(parse_study(raw).schemes["kivi-4"]) is None


def test_tables_of_keys_after_rope_are_of_rotated_keys() -> None:
    raw = study()
    raw["schemes"]["nuq3-after-rope"] = {"kind": "nuq", "bits": 3, "keys": "after-rope"}
    schemes = parse_study(raw).schemes
    model = RandomModel("tiny", CPU)
    before, after = (model.tables(schemes[name]) for name in ("nuq3-1pct", "nuq3-after-rope"))
    assert before is not None and after is not None
    for keys, others, found in zip(model._sample(), before, after, strict=True):
        assert isinstance(found, LayerQuantizer) and isinstance(others, LayerQuantizer)
        cos, sin = rope(torch.arange(len(keys)), 64)
        turned = rotate(keys.view(-1, 1, 64), cos[:, None], sin[:, None])
        scaled = (turned - found.key_zero) / found.key_scale
        outside = (scaled.abs() > 1).float().mean(0)  # 5.12 tokens at each end of a channel
        assert bool(((outside - 11 / 1024).abs() < 1.1 / 1024).all())
        assert not torch.equal(found.key_scale, others.key_scale)


def test_ragged_prompts_fall_to_half() -> None:
    case = KernelCase.model_validate({**FIRST, "batch": 3})
    assert prompt_lengths(case) == [64, 48, 32]
    prompts = Prompts(RandomModel("tiny", CPU, layers=1), case)
    assert prompts.mask is not None
    assert prompts.mask.sum(1).tolist() == [64, 48, 32]
    mask, positions = prompts.after(2)
    assert mask is not None and mask.sum(1).tolist() == [67, 51, 35]
    assert positions[:, 0].tolist() == [66, 50, 34]  # counted from 0
    even = Prompts(RandomModel("tiny", CPU, layers=1), case.model_copy(update={"ragged": False}))
    assert even.mask is None
    assert even.after(0)[1][:, 0].tolist() == [64, 64, 64]


def test_a_layer_step_goes_on_where_the_prompt_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows by one token a call, warm-up included."""
    seen: dict[str, Any] = {}
    bench = Bench(parse_study(study()), CPU)
    plain = RandomModel.with_scheme

    def watched(self: RandomModel, scheme: Any) -> Any:
        made = plain(self, scheme)
        new = made.new_cache

        def tracked(protocol: Any = "A") -> Any:
            cache = new(protocol)
            seen[scheme.kind] = cache
            return cache

        made.new_cache = tracked  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(RandomModel, "with_scheme", watched)
    case = KernelCase.model_validate({**SECOND, "measure": ["layer-step"], "peers": ["kivi-4"]})
    bench.measure("layer-step", case)
    for kind in ("fp16", "nuq", "kivi"):
        assert seen[kind].get_seq_length() == 32 + 1 + 5, kind


def test_continuation_of_a_small_past(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KVQUANT_KERNELS", "triton")  # on a CPU its interpreter
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = KernelCase.model_validate({**SECOND, "measure": ["continue"], "chunk": 3, "tokens": 96})
    part = continuation(Bench(Study.model_validate(study()), where), case)
    sides = {side.side: side for side in part.sides}
    ours, pieces = sides["nuq3-1pct"], sides["nuq3-1pct (PyTorch)"]
    assert ours.role == "ours" and ours.ms is not None and ours.ms.n >= 5
    assert pieces.over_ours is not None and pieces.over_ours.median > 0
    assert any(side.role == "fp16" and side.status == "ok" for side in part.sides)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_measures_on_a_gpu(tmp_path: Path) -> None:
    from kvquant.runtime.provenance import device_name

    raw = study(
        {"one": {**FIRST, "measure": ["pack", "attention", "prefill", "steps", "layer-step"]}}
    )
    raw["kernels"]["cases"]["one"]["steps"] = 70  # packs a full tail
    words = command(tmp_path, raw, device_name=device_name())
    words[words.index("--device") + 1] = "cuda"
    assert main(words) == 0
    parts = {p.measure: p for p in read_record(tmp_path / "out/one.json", KernelRecord).parts}
    for what in ("pack", "attention", "steps"):
        ours = next(side for side in parts[what].sides if side.role == "ours")
        assert ours.status == "ok" and ours.copy_share is not None and ours.copy_share > 0
    assert any(side.over_ours for side in parts["attention"].sides if side.role == "fp16")
