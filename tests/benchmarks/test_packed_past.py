"""The measurement of a chunk over a packed past, small, wherever kernels run.

Also covers: benchmarks.decode.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from kvquant.benchmarks import timing
from kvquant.benchmarks.decode import refusal_of
from kvquant.benchmarks.packed_past import main

pytest.importorskip("triton")


@pytest.mark.slow
# Several blocks, or several sequences: the interpreter packs ten tokens in a second.
@pytest.mark.thinned(2)
@pytest.mark.parametrize(("chunk", "batch", "past"), [(1, 1, 100), (6, 2, 40)])
def test_sides_agree_and_are_timed(
    chunk: int, batch: int, past: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", "triton")  # on a CPU its interpreter, for which 2 do
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    out = tmp_path / "out.json"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    main(
        f"--heads 2 --kv-heads 1 --dim 32 --batch {batch} --past {past} --chunk {chunk} "
        f"--block-size 32 --rounds 2 --device {device} --out {out}".split()
    )
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["largest_difference"] < 5e-3
    assert result["ms"]["kernels"]["n"] == 2
    assert result["ms"]["kernels"]["median"] > result["ms"]["expand"]["median"] > 0
    assert result["speed_over_pytorch"] > 0
    if past == 100:  # few blocks do not fill their arenas
        assert result["packed_bytes"] < result["fp16_bytes"]


def test_a_refusal_says_what_the_backend_warns_of() -> None:
    def refuses() -> None:
        warnings.warn("Flash attention kernel not used because:", stacklevel=1)
        warnings.warn("heads differ (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    assert refusal_of(refuses) == "No available kernel. Aborting execution. heads differ"
    assert refusal_of(lambda: None) is None
