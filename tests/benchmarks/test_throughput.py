"""`kvquant throughput` on a tiny model.

Also covers: benchmarks.prompt_run, benchmarks.workload, study.prompt_lengths, study.timing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.benchmarks.throughput import paired_ratio
from kvquant.benchmarks.workload import Prepared
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cli import main
from kvquant.errors import OutlierOverflow
from kvquant.models.loading import QuantizedModel
from kvquant.runtime.provenance import device_name
from kvquant.study.records import ThroughputRecord, read_record


def measured(tmp_path: Path) -> ThroughputRecord:
    return read_record(tmp_path / "rep0.json", ThroughputRecord)


def test_record(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("throughput")) == 0
    record = measured(tmp_path)
    ours, base = record.scheme_side, record.baseline_side
    assert (record.device, record.rep, record.batch_size) == ("cpu", 0, 3)
    assert record.prompt_tokens == 64 + 48 + 32  # padding is not counted
    for side in (ours, base):
        assert side.status == "ok"
        assert side.prefill_ms is not None
        assert side.decode_ms is not None
        assert side.prefill_ms.n == side.decode_ms.n == 5  # two were asked for, five is the least
        speed = 144 / side.prefill_ms.median * 1e3
        assert side.prefill_tokens_per_s == pytest.approx(speed)
        assert side.decode_tokens_per_s == pytest.approx(3 / side.decode_ms.median * 1e3)
        assert side.peak_bytes is None  # not measured on a CPU
        # 2 layers, keys and values, 2 heads of 16
        assert side.cache_elements == 2 * 2 * 2 * 16 * 144
        assert side.bits_per_element == 8 * side.cache_bytes / side.cache_elements  # type: ignore[operator]
    assert base.quantize_ms is None
    assert ours.quantize_ms is not None
    assert base.prefill_ms is not None
    assert record.prefill_ratio is not None
    assert record.prefill_ratio > 0
    share = ours.quantize_ms.median / base.prefill_ms.median
    assert record.quantize_share == pytest.approx(share)
    # the baseline is a 16-bit cache of padded rows: 3 x 64 columns for 144 tokens
    assert base.bits_per_element == pytest.approx(16 * 192 / 144)
    assert "prefill speed over the baseline" in capsys.readouterr().out


def test_without_an_answer_nothing_is_decoded(command: Any, tmp_path: Path) -> None:
    assert main(command("throughput", workload="p32")) == 0
    side = measured(tmp_path).scheme_side
    assert side.decode_ms is None
    assert side.prefill_ms is not None


def test_the_unquantized_scheme_can_be_timed_too(command: Any, tmp_path: Path) -> None:
    assert main(command("throughput", scheme="fp16", workload="p32")) == 0
    record = measured(tmp_path)
    assert record.quantize_share is None
    assert record.scheme_side.bits_per_element == 16


def test_caches_get_room_before_they_are_timed(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, prompts may have more outliers than a cache expects."""
    told: list[str] = []
    plain = KVQuantCache.settle

    def settle(self: KVQuantCache) -> None:
        plain(self)
        told.append("settled")
        if told.count("settled") == 1:
            raise OutlierOverflow("outliers: 5 found no room")

    monkeypatch.setattr(KVQuantCache, "settle", settle)
    monkeypatch.setattr(KVQuantCache, "widen", lambda self: told.append("widened"))
    assert main(command("throughput")) == 0
    assert told[:3] == ["settled", "widened", "settled"]
    record = measured(tmp_path)
    assert record.scheme_side.status == "ok"
    assert set(record.inputs) >= {"model", "timed_text"}


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_out_of_memory_is_a_result(
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    plain = getattr(Prepared, stage)

    def fails(self: Prepared, cache: Any, *args: Any) -> torch.Tensor:
        if hasattr(cache, "quantize_seconds"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(self, cache, *args)

    monkeypatch.setattr(Prepared, stage, fails)
    assert main(command("throughput")) == 0
    record = measured(tmp_path)
    assert record.scheme_side.status == "oom"
    assert record.scheme_side.prefill_ms is None
    assert record.baseline_side.status == "ok"
    assert record.baseline_side.prefill_ms is not None
    assert record.baseline_side.prefill_ms.n == 5
    assert record.prefill_ratio is None
    assert record.quantize_share is None
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device_name": "h100-80gb-hbm3"}, "--device-name: this is 'cpu', not 'h100-80gb-hbm3'"),
        ({"workload": "p65"}, "unknown workload 'p65': did you mean p64"),
        ({"scheme": "nuq3"}, "--quantizer: needed for scheme 'nuq3'"),
        ({"workload": "long"}, "prompt and answer need 513 positions, but the model has 512"),
        ({"rep": "-1"}, "--rep: must not be negative"),
    ],
)
@pytest.mark.parametrize("verb", ["throughput", "energy"])
def test_bad_input_is_one_line(
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    changed: dict[str, str],
    message: str,
) -> None:
    assert main(command(verb, **changed)) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("kvquant: error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "rep0.json").exists()


@pytest.mark.skipif(device_name() != "cpu", reason="needs a machine without a GPU")
def test_auto_takes_the_cpu_without_a_gpu(command: Any, tmp_path: Path) -> None:
    assert main(command("throughput", device="auto", workload="p32")) == 0
    assert measured(tmp_path).device == "cpu"


def test_a_gpu_beside_it_does_not_rename_a_cpu_run(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvquant.benchmarks.workload.device_name", lambda: "h100-80gb-hbm3")
    assert main(command("throughput", workload="p32", device_name="h100-80gb-hbm3")) == 2
    assert main(command("throughput", workload="p32")) == 0


def test_an_existing_record_is_told_before_measuring(
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rep0.json").write_text("{}")
    monkeypatch.setattr(QuantizedModel, "new_cache", lambda *_: pytest.fail("measured"))
    assert main(command("throughput")) == 2
    assert "exists: delete it by name" in capsys.readouterr().err


def test_a_quantized_baseline_is_refused(
    command: Any, raw_study: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    raw_study["baseline"] = "kivi-4"
    assert main(command("throughput")) == 2
    assert "baseline: 'kivi-4' is not of kind fp16" in capsys.readouterr().err


def test_ratio_is_of_paired_rounds() -> None:
    # the machine slows down in the second half: the pairs do not notice
    assert paired_ratio([10, 10, 10, 30, 30], [20, 20, 20, 60, 60]) == 0.5


def test_both_sides_see_the_same_tokens(command: Any, tmp_path: Path) -> None:
    """Ragged rows answer as each prompt alone does, so padding changes no number."""
    import argparse

    from kvquant.benchmarks.options import throughput
    from kvquant.benchmarks.workload import prepare

    parser = argparse.ArgumentParser()
    throughput(parser)
    args = parser.parse_args(command("throughput")[1:])
    prepared = prepare(args, lambda study: study.throughput.workloads)
    token = prepared.prefill(prepared.baseline())
    batch = prepared.batch
    for row, length in enumerate(batch.lengths):
        with torch.inference_mode():
            alone = prepared.qm.model(input_ids=batch.ids[row : row + 1, -length:]).logits
        assert int(alone[0, -1].argmax()) == int(token[row])


def test_an_empty_test_part_is_refused_before_the_model_is_loaded(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = command("throughput")
    manifest = tmp_path / "data.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"test_from": content["characters"]}))
    monkeypatch.setattr("kvquant.benchmarks.workload.load_quantized_model", None)
    assert main(words) == 2
    found = capsys.readouterr().err
    assert "calibration.dataset: the test part of 'essays' is empty" in found
    assert "name another data set" in found and found.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu(command: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    words = command("throughput", device="cuda", device_name=device_name())
    assert main(words) == 0
    record = measured(tmp_path)
    assert record.scheme_side.peak_bytes
    assert record.scheme_side.quantize_ms is not None
    assert record.scheme_side.quantize_ms.n == 5
