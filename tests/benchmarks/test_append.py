"""`kvquant bench append`: the stores hold what they were given, the record says what was timed.

Also covers: benchmarks.append_stores, study.append.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from kvquant.analysis.claims_of_cost import append_growth
from kvquant.benchmarks import append as module
from kvquant.benchmarks.append import Data, measure
from kvquant.benchmarks.append_stores import BlockedStore, ConcatenatedStore, append_codec
from kvquant.benchmarks.timing import Clock
from kvquant.cli import main
from kvquant.formats.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix
from kvquant.study.append import AppendSpec
from kvquant.study.config import Study
from kvquant.study.records import AppendRecord, read_record
from kvquant.study.schemes import NuqScheme

CPU = torch.device("cpu")


def study(**section: Any) -> dict[str, Any]:
    return {
        "study": "tiny",
        "device": "cpu",
        "models": {"tiny": {"source": "local", "path": "unused"}},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "nuq3-1pct": {"kind": "nuq", "bits": 3, "block_size": 32},
            "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 16},
        },
        "tasks": {"passkey": {"suite": "passkey"}},
        "append": {"sizes": [64, 200], "kv_heads": 2, "head_dim": 16, "rounds": 5, **section},
    }


@pytest.fixture
def command(tmp_path: Path) -> Any:
    def build(raw: dict[str, Any], **changed: str) -> list[str]:
        (tmp_path / "study.json").write_text(json.dumps(raw))
        options = {"study": str(tmp_path / "study.json"), "rep": "0", "device-name": "cpu"}
        options |= {"device": "cpu", "out": str(tmp_path / "rep0.json")}
        options |= {name.replace("_", "-"): value for name, value in changed.items()}
        return ["bench", "append", *(word for k, v in options.items() for word in (f"--{k}", v))]

    return build


def test_record(command: Any, tmp_path: Path) -> None:
    raw = study(chunks=[1, 48], schemes=["fp16", "nuq3-1pct", "kivi-4"], batch_size=2)
    threads = torch.get_num_threads()
    assert main(command(raw)) == 0
    torch.set_num_threads(threads)
    record = read_record(tmp_path / "rep0.json", AppendRecord)
    assert (record.device, record.rep, record.batch_size) == ("cpu", 0, 2)
    assert record.round_tokens == {"1": 32, "48": 96}  # whole blocks of 32 and of 16 tokens
    cells = {(p.series, p.chunk, p.tokens): p for p in record.points}
    names = ("fp16", "nuq3-1pct", "kivi-4", "concatenation")
    assert set(cells) == {(s, c, n) for s in names for c in (1, 48) for n in (64, 200)}
    for (series, chunk, tokens), point in cells.items():
        assert point.status == "ok"
        assert point.token_ms is not None and point.call_ms is not None
        assert point.token_ms.n == 5
        assert point.call_ms.n == 5 * record.round_tokens[str(chunk)] // chunk
        assert point.call_ms.p10 <= point.call_ms.median <= point.call_ms.p99
        if series == "fp16":
            end = tokens + 5 * record.round_tokens[str(chunk)]
            assert point.cache_bytes == 2 * 2 * 2 * 2 * 16 * end
    assert main(command(raw)) == 2  # never overwritten


def test_concatenation_holds_the_same_outliers_in_standard_form() -> None:
    """Token by token and at once, CSC of keys and CSR of values equal those of our blocks."""
    spec = NuqScheme(kind="nuq", bits=3, block_size=32, sinks=0, outliers=0.02)
    codec = append_codec(spec, 2, 16, CPU)
    assert codec is not None
    data = Data(AppendSpec(sizes=[64, 128], kv_heads=2, head_dim=16, batch_size=2), CPU, 3)
    ours, whole, single = BlockedStore(codec), *(ConcatenatedStore(codec, 96) for _ in range(2))
    keys, values = data.take(96)
    ours.append(keys, values)
    whole.append(keys, values)
    for i in range(96):
        single.append(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    for row in range(2):
        table = ours._layout.table[row]
        csc = BlockedCSCMatrix(ours._store.outliers("keys", table)).to_standard_csc()
        csr = BlockedCSRMatrix(ours._store.outliers("values", table)).to_standard_csr()
        expected = {
            "keys": (csc.ccol_indices(), csc.row_indices(), csc.values()),
            "values": (csr.crow_indices(), csr.col_indices(), csr.values()),
        }
        for name, arrays in expected.items():
            for store in (whole, single):
                for got, want in zip(store.to_standard(name, row), arrays, strict=True):
                    assert torch.equal(got, want.to(got.dtype))
    assert single.nbytes == whole.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_data_has_the_scheme_s_share_of_outliers(bits: int) -> None:
    codec = append_codec(NuqScheme(kind="nuq", bits=bits, outliers=0.02), 4, 64, CPU)
    assert codec is not None
    x = torch.randn(8, 4, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    assert codec.pack(x, x).sparse["keys"].nnz == pytest.approx(0.02 * x.numel(), rel=0.05)


def test_every_round_packs_as_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts packed blocks: each token costs one thirty-second of a block."""
    packed = [0.0]
    plain = BlockedStore.append

    def counting(self: BlockedStore, keys: torch.Tensor, values: torch.Tensor) -> None:
        before = len(self._layout.table[0]) if self._layout.table else 0
        plain(self, keys, values)
        packed[0] += len(self._layout.table[0]) - before

    monkeypatch.setattr(BlockedStore, "append", counting)
    spec = Study.model_validate(study(concatenation=False, schemes=["nuq3-1pct"], chunks=[1]))
    record = measure(spec, CPU, Clock(now=lambda: packed[0]), 0)
    for point in record.points:
        assert point.token_ms is not None
        assert point.token_ms.p10 == point.token_ms.p99 == 1e3 / 32


def test_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ConcatenatedStore.append

    def fails(self: ConcatenatedStore, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._length >= 200:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        plain(self, keys, values)

    monkeypatch.setattr(ConcatenatedStore, "append", fails)
    record = measure(Study.model_validate(study(sizes=[20, 200], chunks=[1])), CPU, Clock(), 0)
    status = {(p.series, p.tokens): p.status for p in record.points}
    assert status == {
        ("fp16", 20): "ok",
        ("fp16", 200): "ok",
        ("nuq3-1pct", 20): "ok",
        ("nuq3-1pct", 200): "ok",
        ("concatenation", 20): "ok",
        ("concatenation", 200): "oom",
    }


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ({"sizes": [64]}, {}, "append.sizes: List should have at least 2 items"),
        ({"sizes": [64, 32]}, {}, "sizes: must be positive and increasing"),
        ({"schemes": ["nuq9"]}, {}, "append.schemes: 'nuq9' is not among the schemes"),
        ({}, {"device_name": "h100-80gb-hbm3"}, "--device-name: this is 'cpu'"),
        ({}, {"rep": "-1"}, "--rep: must not be negative"),
    ],
)
def test_bad_input_is_one_line(
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    section: dict[str, Any],
    changed: dict[str, str],
    message: str,
) -> None:
    assert main(command(study(**section), **changed)) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("kvquant: error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "rep0.json").exists()


def test_a_study_without_the_section_is_told(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = study()
    del raw["append"]
    assert main(command(raw)) == 2
    assert "append: this study has no such section" in capsys.readouterr().err


def test_a_headline_that_is_not_ours_has_no_concatenation(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command({**study(), "headline": "kivi-4"})) == 2
    assert "append.concatenation: 'kivi-4' is not of kind nuq" in capsys.readouterr().err


def test_growth_is_that_of_the_worst_repetition() -> None:
    rows = [
        {"rep": rep, "series": "ours", "chunk": chunk, "tokens": n, "token_ms_median": cost}
        for rep, chunk, n, cost in [
            *((0, 1, 1024, 2.0), (0, 1, 4096, 9.0), (0, 1, 131072, 2.2)),
            *((1, 1, 1024, 2.0), (1, 1, 131072, 2.6), (0, 64, 1024, 1.0), (0, 64, 131072, 9.0)),
        ]
    ]
    points = pd.DataFrame(rows)
    assert append_growth(points, "ours") == (pytest.approx(1.3), 1024, 131072)
    assert append_growth(points, "theirs") is None
    assert append_growth(pd.DataFrame(), "ours") is None


@pytest.mark.gpu
def test_on_a_gpu(command: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from kvquant.runtime.provenance import device_name

    words = command(study(chunks=[1, 64]), device="cuda", device_name=device_name())
    assert main(words) == 0
    points = read_record(tmp_path / "rep0.json", AppendRecord).points
    assert all(p.status == "ok" for p in points)
    assert module.CONCATENATION in {p.series for p in points}
