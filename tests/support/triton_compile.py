"""Compiles every Triton kernel that a call launches for a GPU that is not there.

The interpreter, by which kernels are tested without a GPU, accepts what the compiler refuses, such
as a variable that changes its type in a loop. Run as a script, in a process without the
interpreter: `python -m tests.support.triton_compile` prints one line per kernel compiled.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kvquant.kernels import (
    triton_attention,
    triton_expand,
    triton_pack,
    triton_prompt_attention,
    triton_prompt_pack,
)
from kvquant.kernels.backends import device_facts
from kvquant.kernels.prompt_parts import PromptParts
from kvquant.quantization.batched_quant import BatchedKVQuantizer
from tests.support.past_case import PastCase
from tests.support.quantizers import random_quantizer

# Imported before the environment names the interpreter: their kernels are to be compiled.
MODULES = (
    triton_attention,
    triton_expand,
    triton_pack,
    triton_prompt_attention,
    triton_prompt_pack,
)
TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    **{torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"},
    **{
        torch.int8: "*i8",
        torch.float8_e4m3fn: "*fp8e4nv",
        torch.uint8: "*u8",
        torch.int16: "*i16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    },
}
_COMPILED: set[Any] = set()


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _compile(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Takes the place of a launch: compiles the kernel for the arguments' types."""
    options = {n: kwargs[n] for n in ("num_warps", "num_stages") if n in kwargs}
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {n: v for n, v in kwargs.items() if n in kernel.arg_names}
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    for parameter in kernel.params:
        if parameter.name not in given:
            given[parameter.name] = parameter.default
    constants = {n: v for n, v in given.items() if n in fixed or v is None}
    signature = {n: "constexpr" if n in constants else _type(v) for n, v in given.items()}
    key = (kernel.fn.__name__, *sorted(signature.items()), *sorted(map(str, constants.items())))
    if key in _COMPILED:
        return
    _COMPILED.add(key)
    source = ASTSource(kernel, signature, constants)
    triton.compile(source, target=TARGET, options=options)
    print(f"compiled {kernel.fn.__name__}", flush=True)


def _attend() -> None:
    shape: dict[str, Any] = {"bits": 3, "dim": 64, "heads": 2, "group": 2}  # compiled once for all
    # Causal or not is a constant that no type depends on: one dtype has both. A past of one block
    # has no pass that is neither the first nor the last.
    for dtype, causal in ((torch.float16, False), (torch.float16, True), (torch.bfloat16, True)):
        lengths = [70, 33] if dtype is torch.float16 else [40, 33]
        PastCase(lengths, 5, dtype=dtype, **shape).attend(step=1, causal=causal)
    PastCase([300], 1, **shape).attend(step=20)  # long and few enough for splits
    PastCase([40, 33], 5, soft_cap=2.0, learned=True, **shape).attend(step=1, causal=False)


def _pack() -> None:
    # What decides between backends takes the stand-in for the interpreter.
    os.environ |= {"TRITON_INTERPRET": "1", "KVQUANT_KERNELS": "triton"}
    device_facts.cache_clear()
    for dtype, outliers in ((torch.float16, 0.0), (torch.float16, 0.01), (torch.bfloat16, 0.01)):
        tables = random_quantizer(2, 64, 3, scale=(2.7, 3.7), values="uniform")
        x = torch.randn(2, 1, 32, 2, 64, dtype=dtype).transpose(2, 3)
        assert BatchedKVQuantizer(tables, 3, outliers).kernel_pack(x[0], x[1]) is not None


def _prompts() -> None:
    for dtype, dim in ((torch.float16, 64), (torch.bfloat16, 128), (torch.float16, 256)):
        x = torch.randn(1, 2, 200, dim, dtype=dtype)
        counts = torch.tensor([[60, 200, 140]], dtype=torch.int32)
        columns = torch.arange(200, dtype=torch.int32)[None]
        order = torch.arange(dim, dtype=torch.int32)[None].repeat(2, 1)
        padded = PromptParts(x[:, :, :60], 2, 0.1, 3, "triton", columns=columns[:, :60])
        padded.add(x, x, counts, columns=columns, order=order)
        padded.add(x, x, counts, columns=columns)
        padded.add(x, x, counts, columns=columns)
        whole = PromptParts(x, 2, 0.1, 1, "triton")
        whole.add(x, x, window=70)
        if dim < 256:
            triton_prompt_pack.pack_keys(x, x, counts, None, swizzled=True)


if __name__ == "__main__":
    JITFunction.run = _compile
    _attend()
    _pack()
    _prompts()
