"""The measurements of the kernel benchmark, each of which gives one part of a case's record."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kvquant.benchmarks.append_stores import append_codec
from kvquant.benchmarks.decode import BACKENDS, capture, measure_decode
from kvquant.benchmarks.packed_past import measure_continuation
from kvquant.benchmarks.prompt_attention import prompt_sides
from kvquant.benchmarks.random_model import RandomModel, head_dim
from kvquant.benchmarks.timing import Clock, synchronize
from kvquant.benchmarks.turns import Role, Side, issue_rate, take_turns, to_records
from kvquant.cache.codec import Codec
from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.errors import UserError
from kvquant.models.loading import QuantizedModel
from kvquant.models.model_call import cache_argument
from kvquant.models.sdpa import without_cudnn
from kvquant.study.config import Study
from kvquant.study.kernels import SHAPES, WHOLE_MODEL, KernelCase, Measure
from kvquant.study.records import KernelPart
from kvquant.study.schemes import AllocatedScheme, NuqScheme

COPIES = 10  # copies before and after decode steps, which are not interrupted
SETTLE = 5  # decode steps before the timed ones


class Prompts:
    """Holds random, left-padded prompts of a case.

    Args:
        model: The model, for its vocabulary and device.
        case: The case, for the shape of the prompts.
    """

    def __init__(self, model: RandomModel, case: KernelCase) -> None:
        self.ids = model.ids(case.batch, case.tokens)
        lengths = prompt_lengths(case)
        self.mask: torch.Tensor | None = None
        if case.ragged:
            column = torch.arange(case.tokens)
            first = case.tokens - torch.tensor(lengths)
            self.mask = (column[None] >= first[:, None]).long().to(model.device)
            self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        else:
            self.positions = torch.arange(case.tokens, device=model.device)[None]
            self.positions = self.positions.expand(case.batch, -1)

    def after(self, done: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Returns mask and positions `[batch_size, 1]` of the token `done` after the prompts."""
        mask = self.mask
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones((mask.shape[0], done + 1))), 1)
        return mask, self.positions[:, -1:] + 1 + done


def prompt_lengths(case: KernelCase) -> list[int]:
    """Returns the tokens of each prompt: all equal, or falling evenly to half."""
    if not case.ragged or case.batch == 1:
        return [case.tokens] * case.batch
    step = case.tokens / 2 / (case.batch - 1)
    return [round(case.tokens - i * step) for i in range(case.batch)]


class Bench:
    """Runs measurements and holds the model that they need, one at a time.

    Attributes:
        name: Name of the scheme whose kernels the current case measures.
        scheme: That scheme.

    Args:
        study: A study with a section `kernels`.
        device: Device of models and caches.
        clock: Times a region of work; None makes one for the device.
    """

    def __init__(self, study: Study, device: torch.device, clock: Clock | None = None) -> None:
        assert study.kernels is not None
        self.study, self.device, self.spec = study, device, study.kernels
        for case in study.kernel_cases().values():
            self._take(case)
        self.clock = clock or Clock.of(device)
        self._model: RandomModel | None = None

    def _take(self, case: KernelCase) -> None:
        """Takes the scheme of a case; refuses one without kernels."""
        self.name = self.study.kernel_scheme(case)
        scheme = self.study.scheme(self.name)
        if not isinstance(scheme, (NuqScheme, AllocatedScheme)):
            raise UserError(
                f"scheme: '{self.name}' has no kernels to be measured: choose one of kind nuq or "
                "allocated"
            )
        self.scheme: NuqScheme | AllocatedScheme = scheme

    def codec(self, case: KernelCase) -> Codec:
        """Returns the codec of one layer of a case."""
        heads, dim = SHAPES[case.shape]["num_key_value_heads"], head_dim(case.shape)
        codec = append_codec(self.scheme, heads, dim, self.device)
        assert codec is not None
        if codec.rotates_values:  # as in a model that is loaded from files
            codec.expect_rotated_values()
        return codec

    def release(self) -> None:
        """Frees the model's memory."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def model(self, shape: str) -> RandomModel:
        """Returns the whole model of a shape, which is kept for the next case."""
        if self._model is None or self._model.shape != shape:
            self.release()
            self._model = RandomModel(shape, self.device)
        return self._model

    def measure(self, what: Measure, case: KernelCase) -> KernelPart:
        """Runs one measurement of a case."""
        self._take(case)
        if self._model is not None and (
            self._model.shape != case.shape or not set(case.measure) & set(WHOLE_MODEL)
        ):
            self.release()
        part: KernelPart = MEASURES[what](self, case)
        return part


CALLS = 8  # calls of a kernel per graph


def _kernel_side(bench: Bench, name: str, role: Role, work: Callable[[], object]) -> Side:
    """Returns a side for a few launches, which a GPU runs as a graph without the host's time."""
    if bench.device.type != "cuda":
        return Side(name, role, lambda: bench.clock.time(work)[1])

    def calls() -> None:
        for _ in range(CALLS):
            work()

    graph = capture(calls)
    return Side(name, role, lambda: bench.clock.time(graph.replay)[1] / CALLS)


def _part(
    bench: Bench, what: Measure, sides: list[Side], *, elements: int | None = None
) -> KernelPart:
    lanes = issue_rate(bench.device) if elements is not None else None
    records = to_records(sides, elements=elements, lanes_per_s=lanes)
    rate = next((r.gb_per_s for r in records if r.role == "copy"), None)
    return KernelPart(measure=what, copy_gb_per_s=rate, sides=records)


def _timed_sides(
    roles: dict[str, tuple[str, Role]], ms: dict[str, list[float]], refused: dict[str, str]
) -> list[Side]:
    """Returns sides that were timed elsewhere, with name and role by key, in order."""
    sides = []
    for key, (name, role) in roles.items():
        side = Side(name, role, lambda: 0.0)
        if ms.get(key):
            side.times = list(ms[key])
        else:
            side.reason = refused.get(key, "")
            oom = not side.reason or "out of memory" in side.reason
            side.status = "oom" if oom else "refused"
        sides.append(side)
    return sides


@torch.inference_mode()
def pack(bench: Bench, case: KernelCase) -> KernelPart:
    """Times one layer's quantize-and-pack pass against a copy of its input."""
    heads, dim = SHAPES[case.shape]["num_key_value_heads"], head_dim(case.shape)
    size = bench.scheme.block_size
    codec = bench.codec(case)
    shape = (2, case.batch * case.tokens // size, size, heads, dim)
    source = torch.randn(shape, device=bench.device).half()
    keys, values = source.transpose(2, 3)
    target = torch.empty_like(source)
    ours = _kernel_side(bench, bench.name, "ours", lambda: codec.pack(keys, values))
    copied = _kernel_side(bench, "copy", "copy", lambda: target.copy_(source))
    ours.nbytes = source.nbytes + codec.pack(keys, values).nbytes
    copied.nbytes = 2 * source.nbytes
    take_turns([copied, ours], bench.spec)
    return _part(bench, "pack", [copied, ours], elements=source.numel())


@torch.inference_mode()
def attention(bench: Bench, case: KernelCase) -> KernelPart:
    """Times one layer's decode attention as CUDA graphs against torch's fp16 backends."""
    dims, dim = SHAPES[case.shape], head_dim(case.shape)
    heads, kv_heads = dims["num_attention_heads"], dims["num_key_value_heads"]
    found = measure_decode(
        bench.codec(case), heads, kv_heads, dim, case.batch, case.tokens, rounds=bench.spec.rounds
    )
    roles: dict[str, tuple[str, Role]] = {name: (name, "fp16") for name in BACKENDS}
    roles |= {"kvquant": (bench.name, "ours"), "copy": ("copy", "copy")}
    sides = _timed_sides(roles, found.ms, found.refused)
    for key, side in zip(roles, sides, strict=True):
        side.nbytes = found.nbytes[key]
    return _part(bench, "attention", sides, elements=2 * case.batch * case.tokens * heads * dim)


class _Scheme:
    """Makes caches of a scheme, which is built on first use as a peer's package may be missing.

    Args:
        model: The model of the case.
        study: The study that defines the scheme.
        name: Name of the scheme.
    """

    def __init__(self, model: RandomModel, study: Study, name: str) -> None:
        self._model, self._study, self._name = model, study, name
        self._made: QuantizedModel | None = None

    def new_cache(self) -> Any:
        """Returns an empty cache."""
        if self._made is None:
            self._made = self._model.with_scheme(self._study.scheme(self._name))
        return self._made.new_cache("A")


def _schemes(bench: Bench, case: KernelCase) -> list[tuple[str, Role]]:
    names: list[tuple[str, Role]] = [(bench.study.baseline, "fp16"), (bench.name, "ours")]
    return [*names, *((name, "peer") for name in case.peers)]


@torch.inference_mode()
def prefill(bench: Bench, case: KernelCase) -> KernelPart:
    """Times the prefill of the whole model into an empty cache of each scheme."""
    model = bench.model(case.shape)
    prompts = Prompts(model, case)
    sides: list[Side] = []

    def add(name: str, role: Role) -> None:
        scheme = _Scheme(model, bench.study, name)

        def run() -> float:
            cache = scheme.new_cache()
            taken = bench.clock.time(
                lambda: model.model(
                    input_ids=prompts.ids, attention_mask=prompts.mask,
                    position_ids=prompts.positions, **cache_argument(model.model, cache),
                    use_cache=True, logits_to_keep=1,
                )
            )[1]  # fmt: skip
            if side.cache_bytes is None:
                side.cache_bytes = cache_nbytes(cache)
                elements = cache_elements(cache, prompts.mask)
                side.bits_per_element = 8 * side.cache_bytes / elements
            return taken

        side = Side(name, role, run)
        sides.append(side)

    for name, role in _schemes(bench, case):
        add(name, role)
    take_turns(sides, bench.spec)
    return _part(bench, "prefill", sides)


@torch.inference_mode()
def layer_step(bench: Bench, case: KernelCase) -> KernelPart:
    """Times a decode step of a one-layer model called from Python, without output embeddings.

    Every side keeps its cache, which fits in memory for one layer, and appends one token per round.
    """
    model = RandomModel(case.shape, bench.device, layers=1)
    prompts = Prompts(model, case)
    token = model.ids(case.batch, 1)
    decoder = model.model.model

    def add(name: str, role: Role) -> Side:
        scheme = _Scheme(model, bench.study, name)
        held: list[Any] = []
        done = itertools.count()

        def run() -> float:
            if not held:
                cache = scheme.new_cache()
                decoder(
                    input_ids=prompts.ids, attention_mask=prompts.mask,
                    position_ids=prompts.positions, **cache_argument(decoder, cache),
                    use_cache=True,
                )  # fmt: skip
                side.cache_bytes = cache_nbytes(cache)
                side.bits_per_element = 8 * side.cache_bytes / cache_elements(cache, prompts.mask)
                held.append(cache)
            mask, positions = prompts.after(next(done))
            with without_cudnn():
                return bench.clock.time(
                    lambda: decoder(
                        input_ids=token, attention_mask=mask, position_ids=positions,
                        **cache_argument(decoder, held[0]), use_cache=True,
                    )
                )[1]  # fmt: skip

        side = Side(name, role, run)
        return side

    sides = [add(name, role) for name, role in _schemes(bench, case)]
    take_turns(sides, bench.spec)
    return _part(bench, "layer-step", sides)


@torch.inference_mode()
def steps(bench: Bench, case: KernelCase) -> KernelPart:
    """Times greedy decode steps of the whole model as a CUDA graph, with packing of full tails.

    The floor is the time of reading the weights and the cache once each.
    """
    from kvquant.models.graph_decoding import GraphedDecoder

    model = bench.model(case.shape)
    prompts = Prompts(model, case)
    cache = model.with_scheme(bench.scheme).new_cache("A")
    model.model(
        input_ids=prompts.ids, attention_mask=prompts.mask, position_ids=prompts.positions,
        **cache_argument(model.model, cache), use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    nbytes = cache_nbytes(cache)
    bits = 8 * nbytes / cache_elements(cache, prompts.mask)
    decoder = GraphedDecoder(model.model, cache, case.steps + 64)
    token = torch.zeros((case.batch, 1), dtype=torch.long, device=bench.device)
    source = torch.empty(1 << 28, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copying = partial(bench.clock.time, lambda: target.copy_(source))
    for _ in range(SETTLE):
        token = decoder.step(token).argmax(-1, keepdim=True)
        copying()
    copies: list[float | None] = [copying()[1] for _ in range(COPIES)]
    synchronize(bench.device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(case.steps + 1)]
    events[0].record()
    for event in events[1:]:
        token = decoder.step(token).argmax(-1, keepdim=True)
        event.record()
    synchronize(bench.device)
    copies += [copying()[1] for _ in range(COPIES)]
    ours = Side(bench.name, "ours", lambda: 0.0, model.read_bytes + nbytes, nbytes, bits)
    ours.times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    copied = Side("copy", "copy", lambda: 0.0, 2 * source.nbytes, times=copies)
    return _part(bench, "steps", [copied, ours])


@torch.inference_mode()
def continuation(bench: Bench, case: KernelCase) -> KernelPart:
    """Times new tokens over a packed past with the kernels, the PyTorch path and torch's fp16."""
    dims, dim = SHAPES[case.shape], head_dim(case.shape)
    found = measure_continuation(
        bench.codec(case), dims["num_attention_heads"], dims["num_key_value_heads"], dim,
        case.batch, case.tokens, case.chunk, bench.spec.rounds,
        max_seconds=bench.spec.max_seconds, device=str(bench.device),
    )  # fmt: skip
    roles: dict[str, tuple[str, Role]] = {
        "kernels": (bench.name, "ours"),
        "pytorch": (f"{bench.name} (PyTorch)", "peer"),
        **{name: (name, "fp16") for name in BACKENDS},
    }
    sides = _timed_sides(roles, found.ms, found.refused)
    return _part(bench, "continue", sides)


@torch.inference_mode()
def prompt_attention(bench: Bench, case: KernelCase) -> KernelPart:
    """Times one layer's attention of prompts in 8 bits against torch's fp16 backends."""
    dims, dim = SHAPES[case.shape], head_dim(case.shape)
    heads, kv_heads = dims["num_attention_heads"], dims["num_key_value_heads"]
    shape = heads, kv_heads, dim, case.batch, case.tokens
    sides = prompt_sides(bench.clock, bench.device, *shape)
    take_turns(sides, bench.spec)
    return _part(bench, "prompt-attention", sides)


MEASURES: dict[Measure, Callable[[Bench, KernelCase], KernelPart]] = {
    "pack": pack,
    "attention": attention,
    "prefill": prefill,
    "steps": steps,
    "layer-step": layer_step,
    "continue": continuation,
    "prompt-attention": prompt_attention,
}
