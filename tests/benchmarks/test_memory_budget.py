"""A smaller GPU emulated on a larger one."""

from __future__ import annotations

import pytest
import torch

from kvquant.benchmarks.memory_budget import GB, lowered_budget, memory_budget
from kvquant.errors import UserError
from kvquant.models.oom_retry import fits_in_memory, release_memory

CUDA = torch.device("cuda")


def test_a_cpu_has_no_limit() -> None:
    with pytest.raises(UserError, match="needs a GPU"), memory_budget(torch.device("cpu"), 1.0):
        pass


@pytest.mark.parametrize(
    ("limit", "lowered"),
    [
        (0.5, 0.5 - 1 / 80),  # half of 80 GB are allowed
        (1.0, 0.9 - 1 / 80),  # a tenth is in use beside torch
    ],
)
def test_room_is_left_below_what_can_be_reached(
    limit: float, lowered: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, told = torch.device("cuda", 1), []
    for name, value in {
        "get_per_process_memory_fraction": lambda device: limit,
        "mem_get_info": lambda device: (40 * GB, 80 * GB),
        "memory_reserved": lambda device: 32 * GB,
        "set_per_process_memory_fraction": lambda share, device: told.append((share, device)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with lowered_budget([gpu], GB):
        assert told == [(pytest.approx(lowered), gpu)]
    assert told[1:] == [(limit, gpu)]
    with lowered_budget([gpu], 0), lowered_budget([torch.device("cpu")], GB):
        assert len(told) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    def test_the_limit_is_hard_and_ends(self) -> None:
        release_memory()
        free, whole = torch.cuda.mem_get_info()
        if whole - free > 2 * GB:
            pytest.skip("other processes use the GPU, whose memory counts as used")
        with memory_budget(CUDA, 4.0) as allowed:
            assert 0 < allowed <= 4 * GB
            kept = [torch.empty(allowed // 2, dtype=torch.uint8, device=CUDA)]
            whole, free = torch.cuda.mem_get_info()[1], torch.cuda.mem_get_info()[0]
            assert whole - free < 4.1 * GB
            assert not fits_in_memory(
                lambda: kept.append(torch.empty(allowed * 6 // 10, dtype=torch.uint8, device=CUDA))
            )
            pieces: list[torch.Tensor] = []
            while fits_in_memory(
                lambda: pieces.append(torch.empty(2**26, dtype=torch.uint8, device=CUDA))
            ):
                pass
            assert allowed * 0.4 < sum(x.nbytes for x in pieces) <= allowed // 2
            kept.clear()
            pieces.clear()
        release_memory()
        assert fits_in_memory(lambda: torch.empty(6 * GB, dtype=torch.uint8, device=CUDA))

    def test_what_the_card_lacks_is_refused(self) -> None:
        with pytest.raises(UserError, match="lower it"), memory_budget(CUDA, 5000.0):
            pass
        with pytest.raises(UserError, match="raise it"), memory_budget(CUDA, 0.001):
            pass

    def test_without_a_limit_all_memory_counts(self) -> None:
        with memory_budget(CUDA, None) as allowed:
            assert allowed <= torch.cuda.mem_get_info()[1]
