"""`kvquant kernels`: quantize-and-pack against a copy, prefill against the unquantized cache.

The model has random fp16 weights of a known shape: speed depends on shapes, not on what the weights
say. Peers and ours alternate in one process (ABAB); every number is a median with percentiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvquant.baseline_cache import new_baseline_cache
from kvquant.batched_quant import LayerQuantizer
from kvquant.benchmarks.timing import Clock, interleave, summarize
from kvquant.cache import KVQuantCache
from kvquant.cache_size import cache_elements, cache_nbytes
from kvquant.config import NuqScheme
from kvquant.errors import UserError, unknown
from kvquant.nuq import fit
from kvquant.provenance import environment
from kvquant.schemes.registry import build_codecs

SHAPES: dict[str, dict[str, int]] = {
    "7b-mha": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "8b-gqa": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant kernels`."""
    parser.add_argument("--shape", default="7b-mha", help="model shape: " + ", ".join(SHAPES))
    parser.add_argument("--batch", type=int, default=1, help="prompts")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the longest prompt")
    parser.add_argument("--ragged", action="store_true", help="prompt lengths fall to half")
    parser.add_argument("--bits", type=int, default=3, help="2, 3 or 4")
    parser.add_argument("--block-size", type=int, default=64, help="tokens a block")
    parser.add_argument("--layers", type=int, default=0, help="0: all of the shape")
    parser.add_argument("--steps", type=int, default=0, help="decode steps of the whole model")
    parser.add_argument("--skip", nargs="*", default=[], choices=["pack", "prefill", "attention"])
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="end of each measurement")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, made anew")


def _tables(heads: int, dim: int, bits: int, layers: int, device: str) -> list[LayerQuantizer]:
    """Tables that leave one per cent of normal data outside, as a calibration does."""
    one = LayerQuantizer(
        torch.zeros(heads, dim),
        torch.full((heads, dim), 2.576),
        fit("nf", bits),
        fit("nf", bits),
    ).to(device)
    return [one] * layers


@torch.inference_mode()
def _fitted_tables(
    model: Any, shape: dict[str, int], bits: int, device: str
) -> list[LayerQuantizer]:
    """Tables whose ranges leave about one per cent of this model's keys outside."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.original.k_proj.register_forward_hook(
            lambda module, inputs, output: seen.append(output[0].float())
        )
        for layer in model.model.layers
    ]
    model(input_ids=torch.randint(0, shape["vocab_size"], (1, 1024), device=device))
    for hook in hooks:
        hook.remove()
    heads, dim = shape["num_key_value_heads"], _head_dim(shape)
    found = []
    for keys in seen:
        low, high = (torch.quantile(keys, q, dim=0).view(heads, dim) for q in (0.005, 0.995))
        levels = fit("nf", bits).to(device)
        found.append(LayerQuantizer((low + high) / 2, (high - low) / 2, levels, levels))
    return found


def _rounds(
    names: list[str], sides: list[Callable[[], object]], args: argparse.Namespace, device: str
) -> dict[str, Any]:
    clock = Clock.of(torch.device(device))
    times: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str, side: Callable[[], object]) -> Callable[[], None]:
        return lambda: times[name].append(clock.time(side)[1])

    counted, fits = interleave(
        [timed(n, s) for n, s in zip(names, sides, strict=True)],
        warmup=3,
        iterations=args.rounds,
        max_seconds=args.max_seconds,
    )
    return {
        name: summarize(times[name][-counted:]).model_dump() if fit_ else "oom"
        for name, fit_ in zip(names, fits, strict=True)
    }


def measure_pack(shape: dict[str, int], args: argparse.Namespace, device: str) -> dict[str, Any]:
    """One layer's quantize-and-pack pass against a copy of its input."""
    heads, dim = shape["num_key_value_heads"], _head_dim(shape)
    size = args.block_size
    blocks = args.batch * args.tokens // size
    spec = NuqScheme(kind="nuq", bits=args.bits, block_size=size)
    codecs = build_codecs(spec, 1, _tables(heads, dim, args.bits, 1, device))
    assert codecs is not None
    kind = torch.float16
    source = torch.randn(2, blocks, size, heads, dim, device=device, dtype=kind)
    keys, values = source.transpose(2, 3)
    target = torch.empty_like(source)
    packed = codecs[0].pack(keys, values)
    moved = source.nbytes + packed.nbytes
    result = _rounds(
        ["copy", "pack"],
        [lambda: target.copy_(source), lambda: codecs[0].pack(keys, values)],
        args,
        device,
    )
    copy_rate = 2 * source.nbytes / result["copy"]["median"] / 1e6
    pack_rate = moved / result["pack"]["median"] / 1e6
    return {
        **result,
        "copy_gb_per_s": copy_rate,
        "pack_gb_per_s": pack_rate,
        "pack_over_copy": pack_rate / copy_rate,
        "input_bytes": source.nbytes,
        "packed_bytes": packed.nbytes,
    }


def _head_dim(shape: dict[str, int]) -> int:
    return shape["hidden_size"] // shape["num_attention_heads"]


def measure_prefill(shape: dict[str, int], args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Whole prefill of a random model over the quantized and the unquantized cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvquant.models import install_attention

    layers = args.layers or shape["num_hidden_layers"]
    config = LlamaConfig(
        **{**shape, "num_hidden_layers": layers},
        max_position_embeddings=2 * args.tokens,
        attn_implementation="sdpa",
    )
    kind = torch.float16 if device == "cuda" else torch.float32
    torch.set_default_dtype(kind)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    install_attention(model)
    spec = NuqScheme(kind="nuq", bits=args.bits, block_size=args.block_size)
    codecs = build_codecs(spec, layers, _fitted_tables(model, shape, args.bits, device))
    assert codecs is not None
    low = args.tokens // 2 if args.ragged else args.tokens
    lengths = torch.linspace(args.tokens, low, args.batch).long()
    ids = torch.randint(0, shape["vocab_size"], (args.batch, args.tokens), device=device)
    mask = None
    if args.ragged:
        column = torch.arange(args.tokens)
        mask = (column[None] >= args.tokens - lengths[:, None]).long().to(device)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    rotary = model.model.rotary_emb
    like = torch.empty(0, dtype=torch.float32, device=device)
    held: dict[str, int] = {}

    if args.steps:
        made = KVQuantCache(codecs, lambda p: rotary(like, p), static_rope=True)
        with torch.inference_mode():
            model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=made,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        held_step = measure_steps(model, made, args.steps)
        del made
        if "prefill" in args.skip:
            return {"step": held_step}

    @torch.inference_mode()
    def run(name: str, cache: Any) -> None:
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        held[name] = cache_nbytes(cache)
        if name == "kvquant":
            held["elements"] = cache_elements(cache)

    def ours() -> None:
        run("kvquant", KVQuantCache(codecs, lambda p: rotary(like, p)))

    result = _rounds(
        ["fp16", "kvquant"], [lambda: run("fp16", new_baseline_cache()), ours], args, device
    )
    tokens = int(lengths.sum())
    if args.steps:
        result["step"] = held_step
    out: dict[str, Any] = {**result, "tokens": tokens, "layers": layers, "cache_bytes": dict(held)}
    if "oom" not in (result["fp16"], result["kvquant"]):
        out["prefill_ratio"] = result["fp16"]["median"] / result["kvquant"]["median"]
    if "elements" in held:
        out["bits_per_element"] = 8 * held["kvquant"] / held["elements"]
    if result["kvquant"] != "oom":
        out["tokens_per_s"] = 1e3 * tokens / result["kvquant"]["median"]
    return out


def measure_steps(model: Any, cache: KVQuantCache, steps: int) -> dict[str, Any]:
    """Greedy steps of the whole model as a captured graph, packing of full tails included."""
    from kvquant.graphed import GraphedDecoder

    decoder = GraphedDecoder(model, cache, steps + 64)
    tokens = torch.zeros((len(cache.lengths), 1), dtype=torch.long, device="cuda")
    for _ in range(5):
        tokens = decoder.step(tokens).argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        tokens = decoder.step(tokens).argmax(-1, keepdim=True)
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    summary = summarize(times)
    return {**summary.model_dump(), "p99_over_p50": summary.p99 / summary.median}


def run(args: argparse.Namespace) -> None:
    """Measures and writes the JSON file."""
    if args.shape not in SHAPES:
        raise unknown("shape", args.shape, SHAPES)
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; nothing is overwritten")
    if args.tokens % args.block_size:
        raise UserError(f"--tokens: {args.tokens} is not a multiple of the block size")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[args.shape]
    if device == "cpu" and args.steps:
        raise UserError("--steps: needs a GPU")
    parts: dict[str, Any] = {}
    if "pack" not in args.skip:
        parts["pack"] = measure_pack(shape, args, device)
    if "attention" not in args.skip and device == "cuda":
        from kvquant.benchmarks.decode import measure_decode

        kv_heads, dim = shape["num_key_value_heads"], _head_dim(shape)
        tables = _tables(kv_heads, dim, args.bits, 1, device)[0]
        parts["attention"] = measure_decode(
            shape["num_attention_heads"], kv_heads, dim, args.batch, args.tokens, tables,
            bits=args.bits, block_size=args.block_size, rounds=args.rounds,
        )  # fmt: skip
    if "prefill" not in args.skip or args.steps:
        parts["prefill"] = measure_prefill(shape, args, device)
    record = {
        "shape": args.shape,
        "batch": args.batch,
        "tokens": args.tokens,
        "ragged": args.ragged,
        "bits": args.bits,
        "block_size": args.block_size,
        **parts,
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    said = []
    if pack := parts.get("pack"):
        said.append(
            f"pack {pack['pack_over_copy']:.2f} of copy "
            f"({pack['pack_gb_per_s']:.0f} of {pack['copy_gb_per_s']:.0f} GB/s)"
        )
    if attention := parts.get("attention"):
        said.append(f"decode attention {attention['speedup']:.2f} of fp16's speed")
    prefill = parts.get("prefill", {})
    if "prefill_ratio" in prefill:
        said.append(
            f"prefill {prefill['prefill_ratio']:.3f} of fp16, "
            f"{prefill['bits_per_element']:.2f} bits per element"
        )
    if step := prefill.get("step"):
        said.append(f"step {step['median']:.1f} ms (p99/p50 {step['p99_over_p50']:.2f})")
    ragged = " ragged" if args.ragged else ""
    print(
        f"kernels: {args.shape} {args.batch}x{args.tokens}{ragged} {args.bits} bit: "
        + ", ".join(said)
    )
