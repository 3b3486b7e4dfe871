"""Capture of work as a CUDA graph, and what is left after a capture that fails."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from kvquant.models import capturing
from kvquant.models.capturing import capture

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Device:
    """A device that records what is asked of it, and whose captures may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
        self.asked: list[str] = []
        self.fails = fails
        cuda: Any = torch.cuda
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        fakes: dict[str, Any] = {
            "current_stream": lambda: "usual",
            "Stream": stream,
            "stream": lambda s: nullcontext(),
            "CUDAGraph": lambda: "graph",
            "graph_pool_handle": lambda: (0, 7),
            "current_device": lambda: 0,
            "get_rng_state": lambda device: "drawn",
            "graph": self.captured,
            "set_stream": lambda s: self.asked.append(f"stream {s}"),
        }
        monkeypatch.setattr(cuda, "current_stream", lambda: stream(), raising=False)
        for name, fake in fakes.items():
            if name != "current_stream":
                monkeypatch.setattr(cuda, name, fake)
        monkeypatch.setattr(
            capturing, "_end_capture", lambda *given: self.asked.append(f"end {given}")
        )

    def captured(self, graph: str, pool: tuple[int, int], stream: Any) -> Any:
        assert type(stream).__name__ == "Stream"  # one of the current device
        self.asked.append(f"capture {graph} {pool}")
        return nullcontext()


def work(device: Device) -> Any:
    def run() -> torch.Tensor:
        device.asked.append("work")
        if device.fails and device.asked.count("work") == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    return run


def test_work_is_undone_after_warm_up_and_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, fails=False)
    capture(work(device), lambda: device.asked.append("undo"))
    assert device.asked == ["work", "undo", "capture graph (0, 7)", "work", "undo"]


def test_a_failed_capture_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(work(device), lambda: device.asked.append("undo"))
    *before, stream, end = device.asked
    assert before == ["work", "undo", "capture graph (0, 7)", "work"]
    assert stream.startswith("stream") and end == "end (0, (0, 7), 'drawn')"


class TestOnGpu:
    pytestmark = on_gpu

    def test_the_device_goes_on_after_a_failed_capture(self) -> None:
        x = torch.ones(4, device="cuda")

        def waits() -> torch.Tensor:
            return x * x.sum().item()

        torch.cuda.manual_seed(3)
        expected = torch.rand(8, device="cuda")
        torch.cuda.manual_seed(3)
        stream, held = torch.cuda.current_stream(), torch.cuda.memory_allocated()
        for _ in range(2):
            with pytest.raises(RuntimeError):
                capture(waits, lambda: None)
        assert torch.cuda.current_stream() == stream
        assert torch.equal(torch.rand(8, device="cuda"), expected)
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= held + expected.nbytes + 512
        graph, output = capture(lambda: x + 1, lambda: None)
        x.fill_(4)
        graph.replay()
        assert output.tolist() == [5.0] * 4
