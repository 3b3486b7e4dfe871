"""The decision which backend runs: each reason against one, and that there is always an answer.

Also covers: kernels.cache_shape, kernels.limits.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.kernels import backends
from kvquant.kernels.backends import (
    CANDIDATES,
    Backend,
    DeviceFacts,
    Operation,
    Selection,
    decide,
    demand,
    device_facts,
    report,
    select,
    wish,
)
from kvquant.kernels.cache_shape import CacheShape, input_layout
from kvquant.kernels.cuda_build import KernelUnavailable

SHAPE = CacheShape(
    head_dim=128,
    kv_heads=8,
    queries_per_kv_head=4,
    dtype=torch.float16,
    codebook="nuq",
    bits=3,
    block_size=64,
    sinks=1,
    outliers=0.01,
)
GPU = DeviceFacts("cuda", capability=(9, 0))
CPU = DeviceFacts("cpu")


def ask(
    operation: Operation, facts: DeviceFacts = GPU, wished: str = "auto", **changes: Any
) -> Selection:
    """The decision for the usual shape with some fields changed; nothing is compiled."""
    return decide(operation, replace(SHAPE, **changes), facts, wished, load=False)


def test_the_usual_shape_gets_the_first_backend() -> None:
    for operation, candidates in CANDIDATES.items():
        found = ask(operation)
        assert found.backend == next(iter(candidates))
        assert found.refused == ()


# Operation, backend, changed fields of the shape, and what the only reason says.
SHAPES: list[tuple[Operation, Backend, dict[str, Any], str]] = [
    ("pack", "cuda", {"codebook": "kivi"}, "codebook: .*'kivi'; choose a scheme of kind nuq"),
    ("pack", "cuda", {"bits": 5}, "bits: 5 is none of 2, 3, 4; choose"),
    ("pack", "cuda", {"head_dim": 80}, "head_dim: 80 is none of 64, 128, 256; use a model"),
    ("pack", "cuda", {"kv_heads": 160}, "kv_heads: 160 .* 16384 channels; use a model"),
    ("pack", "cuda", {"block_size": 24}, "block_size: 24 with head_dim 128 .*; choose 64"),
    ("pack", "cuda", {"block_size": 1024}, "block_size: 1024 with head_dim 128 .*; choose 64"),
    ("pack", "cuda", {"outliers": 0.6}, "outliers: 307 values .*; choose a smaller fraction"),
    ("pack", "cuda", {"input_layout": "channels"}, "input: .* aligned word; pass contiguous"),
    ("pack", "triton", {"codebook": "kivi"}, "codebook: .*'kivi'"),
    ("pack", "triton", {"bits": 1}, "bits: 1 is none"),
    ("pack", "triton", {"head_dim": 84}, "head_dim: 84 is not a multiple of 8 from 32 on; use"),
    ("pack", "triton", {"head_dim": 24}, "head_dim: 24 is not a multiple of 8 from 32 on; use"),
    ("pack", "triton", {"kv_heads": 160}, "kv_heads: 160 .* 16384 channels"),
    ("pack", "triton", {"block_size": 96}, "block_size: 96 is not a power of two; choose 64"),
    ("pack", "triton", {"outliers": 0.9999}, "outliers: twice 512 .* 1024 .*; choose a smaller"),
    ("pack", "triton", {"input_layout": "strided"}, "input: .*; pass tensors whose last stride"),
    ("pack", "pytorch", {"dtype": torch.float32}, "dtype: blocks of float32 .*; convert them"),
    ("pack", "pytorch", {"head_dim": 84}, "head_dim: 84 is not a multiple of 8, .*; use a model"),
    ("decode", "cuda", {"codebook": "fp8"}, "codebook: .*'fp8'"),
    ("decode", "cuda", {"bits": 8}, "bits: 8 is none"),
    ("decode", "cuda", {"outliers": 1.0}, "outliers: 1 keeps .*; choose a fraction below 1"),
    ("decode", "cuda", {"dtype": torch.float32}, "dtype: .* float32, .*; load the model in one"),
    ("decode", "cuda", {"head_dim": 80}, "head_dim: 80 is none of 64, 128, 256"),
    ("decode", "cuda", {"queries_per_kv_head": 16}, "queries_per_kv_head: 16 are more than 8; use"),
    ("decode", "cuda", {"block_size": 96}, "block_size: 96 is neither 32 nor .*; choose one"),
    ("decode", "cuda", {"sinks": 65}, "sinks: 65 are more than the 64 .*; choose at most 64"),
    ("decode", "cuda", {"protocol": "B"}, "protocol: B reads .*; use protocol A"),
    ("decode", "cuda", {"static_rope": False}, "static_rope: .*; use a model without dynamic"),
    ("decode", "cuda", {"kept_rope": True}, "kept_rope: .*; use a model whose rope"),
    ("decode", "cuda", {"narrow_tables": False}, "calibration: .* float16 .*; calibrate on other"),
    ("decode", "cuda", {"packed_by_kernels": False}, "blocks: PyTorch packed .*; see why"),
    ("decode", "cuda", {"arenas": 2049}, "arenas: 2049 .* 2048 .*; prefill in longer chunks"),
    ("decode", "cuda", {"arena_blocks": (1 << 20) + 1}, "arena_blocks: 1048577 .*; prefill"),
    ("decode", "cuda", {"rotates_values": True}, "rotates_values: .*; load .* `rotation: false`"),
    ("decode", "cuda", {"rotated_keys": True}, "rotated_keys: .*; choose .* `keys: before-rope`"),
    ("past", "triton", {"rotated_keys": True}, "rotated_keys: keys are stored after RoPE"),
    ("past", "triton", {"rotates_values": True}, "rotates_values: "),
    ("past", "triton", {"codebook": "turboquant"}, "codebook: .*'turboquant'"),
    ("past", "triton", {"head_dim": 96}, "head_dim: 96 is none of 32, 64, 128, 256"),
    ("past", "triton", {"query_dtype": torch.float32}, "query_dtype: float32 .*; load the model"),
    ("past", "triton", {"kept_rope": True}, "kept_rope: "),
    ("past", "triton", {"narrow_tables": False}, "calibration: "),
    ("past", "triton", {"packed_by_kernels": False}, "blocks: "),
    ("past", "triton", {"arenas": 5000}, "arenas: 5000"),
]


# The same for blocks of allocated codes, which the CUDA kernels pack.
ALLOCATED: list[tuple[Backend, dict[str, Any], str]] = [
    ("cuda", {"head_dim": 80}, "head_dim: 80 is none of 64, 128, 256; use a model"),
    ("cuda", {"block_size": 32}, "block_size: 32 is not a multiple of the 64 .*; choose 64"),
    ("cuda", {"block_size": 96}, "block_size: 96 is not a multiple of the 64 .*; choose 64"),
    ("cuda", {"dtype": torch.float32}, "dtype: .* float32, .*; load the model in one"),
    ("triton", {"block_size": 32}, "codebook: .*'allocated'; choose"),
]


# Of what reads such blocks.
READERS: list[tuple[Operation, Backend, dict[str, Any], str]] = [
    ("decode", "cuda", {"block_size": 32}, "block_size: 32 is not a multiple of the 64"),
    ("decode", "cuda", {"rotates_values": True}, "rotates_values: "),
    ("past", "triton", {"block_size": 32}, "block_size: 32 is not a multiple of the 64"),
    ("decode", "cuda", {"rotated_keys": True}, "rotated_keys: "),
    ("past", "triton", {"rotated_keys": True}, "rotated_keys: "),
    ("past", "triton", {"rotates_values": True}, "rotates_values: "),
    ("past", "triton", {"head_dim": 32}, "head_dim: 32 is none of 64, 128, 256"),
    ("past", "triton", {"query_dtype": torch.bfloat16}, "query_dtype: bfloat16 is not .* float16"),
]


@pytest.mark.parametrize(("operation", "backend", "changes", "says"), READERS)
def test_reading_allocated_codes_is_refused_for_one_reason(
    operation: Operation, backend: Backend, changes: dict[str, Any], says: str
) -> None:
    found = ask(operation, codebook="allocated", bits=3, **changes)
    (reason,) = found.reasons(backend)
    assert re.match(says, reason)
    assert ask(operation, codebook="allocated", bits=3).backend == backend


def test_a_cuda_kernel_expands_allocated_codes_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPE, codebook="allocated", bits=3)
    found = decide("past", shape, replace(GPU, nvrtc="gone"), "auto", load=False)
    assert found.backend == "pytorch" and "cuda-bindings: NVRTC" in found.reasons("triton")[0]
    assert decide("past", shape, GPU, "triton", load=False).backend == "pytorch"

    def fails(shape: Any, index: int) -> None:
        raise KernelUnavailable("expand_allocated.cu: line 1")

    monkeypatch.setattr(backends.cuda_expand_allocated, "function", fails)
    with pytest.warns(UserWarning, match="no CUDA expansion kernel"):
        found = decide("past", replace(shape, kv_heads=77), GPU, "auto")
    assert found.backend == "pytorch" and found.reasons("triton")[0].startswith("kernel: ")


@pytest.mark.parametrize(("backend", "changes", "says"), ALLOCATED)
def test_a_shape_of_allocated_codes_is_refused_for_one_reason(
    backend: Backend, changes: dict[str, Any], says: str
) -> None:
    found = ask("pack", codebook="allocated", **changes)
    assert found.backend == (None if "dtype" in changes else "pytorch")
    (reason,) = found.reasons(backend)
    assert re.match(says, reason)


@pytest.mark.parametrize("block_size", [64, 128, 1024])
@pytest.mark.parametrize("layout", ["pairs", "channels", "strided"])
def test_allocated_codes_are_packed_by_cuda_alone(block_size: int, layout: Any) -> None:
    shape: dict[str, Any] = {"codebook": "allocated", "input_layout": layout}
    shape |= {"block_size": block_size, "kv_heads": 300, "range_per_head": True}
    assert ask("pack", **shape).backend == "cuda"
    assert ask("pack", **shape, head_dim=256, outliers=0.0).backend == "cuda"
    assert ask("pack", wished="triton", **shape).backend == "pytorch"
    assert ask("pack", CPU, **shape).backend == "pytorch"


@pytest.mark.parametrize(("operation", "backend", "changes", "says"), SHAPES)
def test_a_shape_is_refused_for_one_reason(
    operation: Operation, backend: Backend, changes: dict[str, Any], says: str
) -> None:
    wished = "triton" if backend == "triton" and operation == "pack" else "auto"
    found = ask(operation, wished=wished, **changes)
    assert found.backend != backend
    (reason,) = found.reasons(backend)
    assert re.match(says, reason)


# Backend, facts, KVQUANT_KERNELS, and what the only reason says.
DEVICES: list[tuple[Backend, DeviceFacts, str, str]] = [
    ("cuda", GPU, "pytorch", "KVQUANT_KERNELS: 'pytorch' turns GPU kernels off; unset it"),
    ("triton", GPU, "pytorch", "KVQUANT_KERNELS: 'pytorch' turns GPU kernels off; unset it"),
    ("cuda", GPU, "triton", "KVQUANT_KERNELS: 'triton' leaves the CUDA kernels out; unset it"),
    ("cuda", CPU, "auto", "device: cpu is not a GPU .*; move the model to one"),
    ("triton", CPU, "auto", "device: cpu is not a GPU .*; move the model to one"),
    ("triton", CPU, "triton", "TRITON_INTERPRET: .* type cpu .*; set it to 1 before"),
    (
        "cuda",
        replace(GPU, capability=(7, 5)),
        "auto",
        "device: compute capability 7.5 is below 8.0; use an A100",
    ),
    ("cuda", replace(GPU, nvrtc="no libnvrtc"), "auto", "cuda-bindings: .*libnvrtc.*; install"),
    ("triton", replace(GPU, nvrtc="no libnvrtc", triton=False), "auto", "triton: .*; install"),
]


@pytest.mark.parametrize(("backend", "facts", "wished", "says"), DEVICES)
def test_a_device_is_refused_for_one_reason(
    backend: Backend, facts: DeviceFacts, wished: str, says: str
) -> None:
    found = ask("decode", facts, wished)
    assert found.backend != backend
    (reason,) = found.reasons(backend)
    assert re.match(says, reason)


def test_numbers_fit_up_to_the_last_block() -> None:
    most: dict[str, Any] = {"arenas": 1 << 11, "arena_blocks": 1 << 20}
    assert ask("decode", **most).backend == "cuda"
    assert ask("past", **most).backend == "triton"


def test_several_reasons_are_all_told() -> None:
    found = ask("decode", CPU, "triton", head_dim=80, protocol="B")
    told = [reason.split(":")[0] for reason in found.reasons("cuda")]
    assert told == ["KVQUANT_KERNELS", "device", "head_dim", "protocol"]
    assert found.lines()[0] == "decode step: pytorch"
    assert found.lines()[1].startswith("  not cuda: KVQUANT_KERNELS: ")
    assert len(found.lines()) == 1 + 4 + len(found.reasons("triton"))


def test_no_backend_is_an_answer_too() -> None:
    found = ask("pack", dtype=torch.float32)
    assert found.backend is None
    assert found.lines()[0] == "quantize and pack: no backend"
    assert [backend for backend, _ in found.refused] == ["cuda", "triton", "pytorch"]


def test_the_interpreter_runs_triton_on_demand_only() -> None:
    interpreted = replace(CPU, interpreter=True)
    assert ask("past", interpreted, "triton").backend == "triton"
    assert ask("past", interpreted, "triton", query_dtype=torch.float32).backend == "triton"
    assert ask("past", interpreted).backend == "pytorch"


SHAPE_VALUES = st.builds(
    CacheShape,
    head_dim=st.sampled_from([1, 16, 32, 64, 80, 84, 96, 128, 256, 512]),
    kv_heads=st.integers(1, 200),
    queries_per_kv_head=st.integers(1, 20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    codebook=st.sampled_from(["nuq", "kivi", "fp8", "allocated"]),
    bits=st.integers(1, 8),
    block_size=st.sampled_from([1, 8, 16, 24, 32, 64, 96, 128, 1024, 4096]),
    sinks=st.sampled_from([0, 1, 32, 33, 64, 65, 1000]),
    outliers=st.sampled_from([0.0, 0.001, 0.01, 0.5, 0.999, 1.0]),
    rotated_keys=st.booleans(),
    narrow_tables=st.booleans(),
    query_dtype=st.sampled_from([None, torch.float16, torch.float32]),
    protocol=st.sampled_from(["A", "B"]),
    static_rope=st.booleans(),
    kept_rope=st.booleans(),
    packed_by_kernels=st.booleans(),
    arenas=st.sampled_from([0, 1, 2048, 2049]),
    arena_blocks=st.sampled_from([0, 1, 1 << 20, (1 << 20) + 1]),
    input_layout=st.sampled_from(["pairs", "channels", "strided"]),
)
FACTS = st.builds(
    DeviceFacts,
    type=st.sampled_from(["cuda", "cpu", "xpu", "meta"]),
    capability=st.sampled_from([(7, 0), (7, 5), (8, 0), (9, 0), (12, 0)]),
    nvrtc=st.sampled_from([None, "missing"]),
    triton=st.booleans(),
    interpreter=st.booleans(),
)
FIELDS = {field.name for field in fields(CacheShape)} | {
    "KVQUANT_KERNELS", "TRITON_INTERPRET", "device", "cuda-bindings", "triton", "calibration",
    "blocks", "input",
}  # fmt: skip


@given(shape=SHAPE_VALUES, facts=FACTS, wished=st.sampled_from(["auto", "triton", "pytorch"]))
def test_every_combination_gets_a_backend_or_reasons(
    shape: CacheShape, facts: DeviceFacts, wished: str
) -> None:
    for operation, candidates in CANDIDATES.items():
        found = decide(operation, shape, facts, wished, load=False)
        refused = [backend for backend, _ in found.refused]
        asked = [*refused, found.backend] if found.backend else refused
        assert asked == list(candidates)[: len(asked)]
        assert found.backend or len(asked) == len(candidates)
        for _, reasons in found.refused:
            assert reasons and len(set(reasons)) == len(reasons)
            for reason in reasons:
                assert reason.split(":")[0] in FIELDS
                assert reason.count("; ") == 1 and "\n" not in reason
        assert operation == "pack" or found.backend  # PyTorch reads whatever was packed


def test_a_kernel_that_does_not_compile_is_refused_and_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise KernelUnavailable("decode.cu: line 1\nline 2")

    monkeypatch.setattr(backends.cuda_decode, "functions", fail)
    monkeypatch.setattr(backends.cuda_pack, "functions", fail)
    monkeypatch.setattr(backends.cuda_pack_allocated, "functions", fail)
    shape = replace(SHAPE, kv_heads=33, queries_per_kv_head=5)  # of no other test: kept per process
    with pytest.warns(UserWarning, match="no CUDA packing kernel, another backend instead"):
        found = decide("pack", replace(shape, codebook="allocated"), GPU, "auto")
    assert found.backend == "pytorch"
    for operation in ("pack", "decode"):
        with pytest.warns(UserWarning, match="no CUDA .* kernel, another backend instead"):
            found = decide(operation, shape, GPU, "auto")
        assert found.backend == "triton"
        (reason,) = found.reasons("cuda")
        assert re.match(r"kernel: .*\(decode.cu: line 1\); report this", reason)
    assert decide("decode", replace(shape, arenas=1), GPU, "auto").backend == "triton"


def test_select_reads_the_device_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("KVQUANT_KERNELS", "pytorch")
    assert select("pack", SHAPE, cpu).backend == "pytorch"
    monkeypatch.setenv("KVQUANT_KERNELS", "cuda")
    with pytest.raises(UserError, match="'cuda' is none of auto, pytorch, triton"):
        select("pack", SHAPE, cpu)
    monkeypatch.delenv("KVQUANT_KERNELS")
    assert wish() == "auto"
    assert device_facts(cpu).type == "cpu"
    assert select("decode", SHAPE, cpu).reasons("cuda")[0].startswith("device: cpu")


def test_a_measurement_demands_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", "auto")
    demand("decode", "pytorch", SHAPE, torch.device("cpu"))
    with pytest.raises(UserError, match=r"decode step: cuda does not .*\. device: .*\. sinks: 99"):
        demand("decode", "cuda", replace(SHAPE, sinks=99), torch.device("cpu"))


def test_a_report_knows_what_packing_means_for_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "device_facts", lambda device: GPU)
    monkeypatch.setattr(backends.cuda_pack, "functions", None)  # a report compiles nothing
    cuda = torch.device("cuda")
    assert {k: v.backend for k, v in report(SHAPE, cuda).items()} == {
        "pack": "cuda", "decode": "cuda", "past": "triton",
    }  # fmt: skip
    found = report(replace(SHAPE, block_size=192, kv_heads=300), cuda)
    assert found["pack"].backend == found["decode"].backend == "pytorch"
    assert [r.split(":")[0] for r in found["decode"].reasons("cuda")] == ["blocks"]


def test_input_layout() -> None:
    x = torch.zeros(2, 3, 32, 64, dtype=torch.float16)
    assert input_layout(x, x) == "pairs"
    assert input_layout(x, x[..., ::2]) == "strided"
    assert input_layout(x.view(-1)[1:65].view(1, 1, 1, 64), x) == "channels"
    assert input_layout(torch.zeros(2, 1, 4, 63, dtype=torch.float16)) == "channels"
    assert input_layout(x.transpose(2, 3)) == "strided"


def test_the_constants_of_kernels_come_from_the_shape() -> None:
    assert SHAPE.decode_shape.fraction == 0.01 and SHAPE.decode_shape.outliers
    assert not replace(SHAPE, outliers=0.0).decode_shape.outliers
    assert SHAPE.pack_shape.per_side == SHAPE.outliers_per_side == 5
    assert SHAPE.pack_shape.heads == 8
    assert SHAPE.pack_kernel == SHAPE.pack_shape
    allocated = replace(SHAPE, codebook="allocated", range_per_head=True)
    assert allocated.pack_kernel == allocated.allocated_pack_shape
    assert allocated.allocated_pack_shape.outliers and allocated.allocated_pack_shape.range_per_head


def test_an_empty_wish_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQUANT_KERNELS", "")
    assert backends.wish() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_said_so() -> None:
    with pytest.raises(UserError, match="no GPU is visible"):
        backends.device_facts(torch.device("cuda"))
