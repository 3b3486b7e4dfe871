"""The table of kernels says what the one decision of backends says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.diagnosis.kernel_table import SchemeKernels, scheme_kernels
from kvquant.diagnosis.model_facts import CacheFacts
from kvquant.kernels import backends
from kvquant.kernels.backends import DeviceFacts
from kvquant.study.asked_schemes import asked_scheme, one_of_each_kind

FACTS: dict[str, Any] = {
    "windows": (None,) * 4, "heads": 32, "kv_heads": 8, "head_dim": 128, "soft_cap": None,
    "static_rope": True, "kept_rope": False, "positions": 8192, "hidden": 4096, "widest": 14336,
    "eager": False,
}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that torch sees an H100."""
    found = DeviceFacts("cuda", capability=(9, 0))
    monkeypatch.setattr(backends, "device_facts", lambda device: found)
    monkeypatch.setenv("KVQUANT_KERNELS", "auto")


def row(name: str, quantized_weights: bool = False, **facts: Any) -> SchemeKernels:
    """A scheme's row on the GPU."""
    return scheme_kernels(
        name, asked_scheme(name), CacheFacts(**{**FACTS, **facts}), dtype=torch.bfloat16,
        device=torch.device("cuda"), quantized_weights=quantized_weights,
    )  # fmt: skip


def backends_of(found: SchemeKernels) -> list[str | None]:
    return [selection.backend for selection in found.selections.values()]


@pytest.mark.usefixtures("gpu")
def test_ours_gets_kernels_and_peers_are_told_why_not() -> None:
    for name in ("nuq3-1pct", "allocated-3"):
        assert (row(name).state, backends_of(row(name))) == ("ok", ["cuda", "cuda", "triton"])
    peer = row("kivi-4")
    assert (peer.state, set(backends_of(peer))) == ("warning", {"pytorch"})
    refused = peer.as_json()["operations"]["pack"]["refused"]
    assert [one["backend"] for one in refused] == ["cuda", "triton"]
    assert refused[0]["reasons"][0].startswith("codebook: ")
    assert row("fp16").state == "ok" and not row("fp16").selections


@pytest.mark.usefixtures("gpu")
def test_the_model_decides_too() -> None:
    assert backends_of(row("nuq3-1pct", head_dim=80)) == ["triton", "pytorch", "pytorch"]
    grown = row("nuq3-1pct", static_rope=False, kept_rope=True)
    assert grown.selections["past"].reasons("triton")[0].startswith("kept_rope")
    # rotations that differ by layer leave the kernels for longer calls
    layers = row("nuq3-1pct", static_rope=False)
    assert backends_of(layers) == ["cuda", "triton", "triton"]
    weights = row("allocated-3", quantized_weights=True)
    assert weights.selections["decode"].reasons("cuda")[0].startswith("rotates_values")


@pytest.mark.usefixtures("gpu")
def test_a_scheme_that_does_not_serve_the_model_is_missing() -> None:
    found = row("nuq3-1pct", head_dim=20)
    assert found.state == "missing" and "multiple of 8" in found.problem and not found.selections
    assert row("kvquant-ref3-1pct").state == "ok"


def test_every_kind_has_a_row_on_the_cpu() -> None:
    for name, scheme in one_of_each_kind().items():
        found = scheme_kernels(
            name, scheme, CacheFacts(**FACTS), dtype=torch.float32, device=torch.device("cpu")
        )
        assert found.kind == scheme.kind and set(found.as_json()) == {
            "scheme", "kind", "state", "problem", "operations",
        }  # fmt: skip
        assert found.state == "ok" or "needs the package" in found.problem
        assert set(backends_of(found)) <= {"pytorch"}
