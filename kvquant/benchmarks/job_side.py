"""One cache's side of a case of whole jobs: prefill, decoding and what fits in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from kvquant.benchmarks.timing import held_bytes, peak_bytes, reset_peak, synchronize
from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.cache.joining import join_caches
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.energy.gpus import devices_of
from kvquant.errors import OutlierOverflow
from kvquant.models.graph_decoding import GraphedDecoder
from kvquant.models.loading import QuantizedModel
from kvquant.models.model_call import cache_argument
from kvquant.models.oom_retry import fits_in_memory, release_memory
from kvquant.models.sdpa import without_cudnn
from kvquant.models.static_decoding import StaticDecoder
from kvquant.runtime.progress import note
from kvquant.schemes.fp16_static import StaticFp16Cache
from kvquant.study.jobs import CONTEXT_CHUNK, JobCase
from kvquant.study.limits import MAX_TOKENS

Step = Callable[[torch.Tensor], torch.Tensor]
PARTS = 64  # the shortest part of a prompt in the search of what fits, as a share of the prompt


@dataclass
class JobSizes:
    """The sizes of one job in a process.

    Attributes:
        peaks: Largest number of bytes that torch held on each device.
        steady: Bytes that torch held on all devices while answers were decoded.
        cache_bytes: Bytes of the cache after the prompts.
        elements: Number of key and value elements in those bytes.
    """

    peaks: list[int] = field(default_factory=list)
    steady: int = 0
    cache_bytes: int = 0
    elements: int = 0


@dataclass
class JobTimes:
    """The times and sizes of one job.

    Attributes:
        prefill_seconds: Seconds of all prompts.
        decode_seconds: Seconds of all answers, capture of a graph included.
        first_token_ms: Milliseconds of each prompt until its first token.
        step_ms: Milliseconds of each decode step.
        decoder: How answers were decoded.
        sizes: Its sizes.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    decoder: str = ""
    sizes: JobSizes = field(default_factory=JobSizes)

    @property
    def seconds(self) -> float:
        """Seconds of prompts and answers."""
        return self.prefill_seconds + self.decode_seconds


@dataclass
class JobSide:
    """Runs jobs on one cache.

    Args:
        name: Name of the scheme.
        qm: The model with the scheme's caches.
        case: The case.
        graphs: Whether answers may be decoded by CUDA graphs, which need one process and GPU.
    """

    name: str
    qm: QuantizedModel
    case: JobCase
    graphs: bool = True

    @property
    def device(self) -> torch.device:
        """The device of the inputs, and of the model if it is on one."""
        return self.qm.device

    @cached_property
    def devices(self) -> list[torch.device]:
        """All devices of the model."""
        return devices_of(self.qm.model.parameters())

    def _ids(self, row: int, tokens: int) -> torch.Tensor:
        """Returns the token ids of a prompt, int64 `[1, tokens]`, the same for every cache."""
        generator = torch.Generator().manual_seed(row)
        vocabulary = int(self.qm.model.config.vocab_size)
        return torch.randint(0, vocabulary, (1, tokens), generator=generator).to(self.device)

    @torch.inference_mode()
    def _call(self, cache: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Runs the tokens `ids` `[1, tokens]` from position `start`; returns the next token."""
        logits = self.qm.model(
            input_ids=ids,
            position_ids=torch.arange(start, start + ids.shape[1], device=self.device)[None],
            **cache_argument(self.qm.model, cache),
            use_cache=True,
            logits_to_keep=1,
        ).logits
        if isinstance(cache, KVQuantCache):
            cache.settle()
        return logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def prefill_one(self, row: int, tokens: int) -> tuple[Any, torch.Tensor]:
        """Runs one prompt; returns its cache and the first token of its answer, `[1, 1]`.

        A cache that loses outliers for lack of room is filled anew with more, as later ones are.
        """
        ids = self._ids(row, tokens)
        while True:
            cache = self.qm.new_cache("A")
            try:
                return cache, self._call(cache, ids, 0)
            except OutlierOverflow:
                cache.widen()

    def prefill(self, batch: int, times: JobTimes) -> tuple[Any, torch.Tensor]:
        """Runs all prompts one after the other; returns the joined cache and first tokens."""
        caches, firsts = [], []
        for row in range(batch):
            start = time.perf_counter()
            cache, first = self.prefill_one(row, self.case.prompt)
            synchronize(*self.devices)
            times.first_token_ms.append((time.perf_counter() - start) * 1e3)
            caches.append(cache)
            firsts.append(first)
        return (join_caches(caches) if batch > 1 else caches[0]), torch.cat(firsts)

    def _decoder(self, cache: Any, batch: int) -> tuple[str, Step]:
        """Returns the fastest way to decode from a cache, and what it is called.

        A CUDA graph holds the work of one GPU: a model over several is called step by step.
        """
        steps, model = self.case.answer, self.qm.model
        alone = self.graphs and len(self.devices) == 1
        if isinstance(cache, KVQuantCache) and self.device.type == "cuda" and alone:
            try:
                return "CUDA graph", GraphedDecoder(model, cache, steps).step
            except ValueError as error:
                note(f"jobs: {self.name}: without a CUDA graph: {error}")
        if isinstance(cache, StaticFp16Cache) and not alone:
            cache.reserve(steps)
        elif isinstance(cache, StaticFp16Cache):
            mask = torch.ones((batch, self.case.prompt), dtype=torch.long, device=self.device)
            decoder = StaticDecoder(model, cache, mask, steps)
            if decoder.backend is None:
                return "from Python, one size", decoder.step
            return f"CUDA graph, {decoder.backend.name.lower()}", decoder.step
        position = torch.full((batch, 1), self.case.prompt - 1, device=self.device)

        def step(tokens: torch.Tensor) -> torch.Tensor:
            position.add_(1)
            with without_cudnn():
                logits: torch.Tensor = model(
                    input_ids=tokens,
                    position_ids=position,
                    **cache_argument(model, cache),
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
            return logits[:, -1]

        return "from Python", step

    def _generate(self, cache: Any, token: torch.Tensor) -> _Marks:
        """Decodes by transformers' `generate`, as a user calls it; returns the steps' marks."""
        prompts = [self._ids(row, self.case.prompt) for row in range(len(token))]
        ids = torch.cat([torch.cat(prompts), token], 1)
        marks = _Marks(self.device)
        if not self.graphs:
            cache.graphs = False

        def mark(*args: Any, **kwargs: Any) -> torch.Tensor:
            marks.set()
            return torch.zeros(len(token), dtype=torch.bool, device=self.device)

        self.qm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=self.case.answer,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=[mark],
        )
        return marks

    @torch.inference_mode()
    def decode(self, cache: Any, token: torch.Tensor, times: JobTimes) -> None:
        """Decodes the answers of all prompts greedily, without a check for end tokens."""
        if self.case.decode == "generate":
            times.decoder = "generate"
            marks = self._generate(cache, token)
        else:
            times.decoder, step = self._decoder(cache, len(token))
            marks = _Marks(self.device)
            for _ in range(self.case.answer):
                token = step(token).argmax(-1, keepdim=True)
                marks.set()
        times.step_ms = marks.differences()
        times.sizes.steady = held_bytes(self.devices)
        if isinstance(cache, KVQuantCache):
            cache.settle()

    def job(self, batch: int, between: Callable[[], None] = lambda: None) -> JobTimes:
        """Runs one job and returns its times.

        Args:
            batch: Number of prompts.
            between: Called between the prompts and the answers, while the device is idle.
        """
        times = JobTimes()
        reset_peak(self.devices)
        synchronize(*self.devices)
        start = time.perf_counter()
        cache, token = self.prefill(batch, times)
        synchronize(*self.devices)
        times.prefill_seconds = time.perf_counter() - start
        times.sizes.cache_bytes = cache_nbytes(cache)
        times.sizes.elements = cache_elements(cache, None)
        between()
        start = time.perf_counter()
        self.decode(cache, token, times)
        synchronize(*self.devices)
        times.decode_seconds = time.perf_counter() - start
        times.sizes.peaks = [peak_bytes([device]) for device in self.devices]
        return times

    def tokens_that_fit(self) -> tuple[int, int]:
        """Fills the GPU with prompts until it is out of memory.

        The last prompt is shortened, in steps of 1/64 of a prompt, to what still fits.

        Returns:
            The number of prompts and of tokens that were held at once, each prompt prefilled beside
            all those before.
        """
        caches: list[Any] = []
        prompt = self.case.prompt
        while fits_in_memory(lambda: caches.append(self.prefill_one(len(caches), prompt)[0])):
            pass
        whole, extra, part = len(caches), 0, prompt // 2
        while part and part >= prompt // PARTS:
            length = extra + part
            if fits_in_memory(lambda n=length: self.prefill_one(whole, n)):  # type: ignore[misc]
                extra = length
            part //= 2
        caches.clear()
        release_memory()
        return whole, whole * prompt + extra

    def _chunks(self, cache: Any, tokens: int) -> Iterator[int]:
        """Runs a prompt of up to `tokens` tokens in several calls; yields what is held so far."""
        for start in range(0, tokens, CONTEXT_CHUNK):
            end = min(start + CONTEXT_CHUNK, tokens)
            self._call(cache, self._ids(start, end - start), start)
            synchronize(*self.devices)
            if start == 0 and isinstance(cache, StaticFp16Cache):
                cache.reserve(tokens - end)
            yield end

    def _held(self, tokens: int) -> int:
        """Returns how many of up to `tokens` tokens of one prompt a new cache holds."""
        held = 0

        def fill() -> None:
            nonlocal held
            while True:
                held, cache = 0, self.qm.new_cache("A")
                try:
                    for end in self._chunks(cache, tokens):
                        held = end
                    return
                except OutlierOverflow:
                    cache.widen()

        fits_in_memory(fill)
        return held

    def longest_context(self) -> int:
        """Finds the longest single prompt that fits, in calls of `CONTEXT_CHUNK` tokens.

        A cache that grows takes one call after the other until memory ends. One that is allocated
        beforehand is tried by twice the length until it fails, then by halves between.
        """
        release_memory()
        if not isinstance(self.qm.new_cache("A"), StaticFp16Cache):
            return self._held(MAX_TOKENS)
        fits, fails = 0, CONTEXT_CHUNK
        while fails < MAX_TOKENS and self._held(fails) == fails:
            fits, fails = fails, 2 * fails
        while fails - fits > CONTEXT_CHUNK:
            middle = (fits + fails) // 2 // CONTEXT_CHUNK * CONTEXT_CHUNK
            if self._held(middle) == middle:
                fits = middle
            else:
                fails = middle
        return fits

    def largest_batch(self, batch: int, *, fewer: bool = True) -> tuple[int, float]:
        """Finds the largest number of prompts up to `batch` whose job fits, and warms up by it.

        Args:
            batch: Number of prompts to begin with.
            fewer: Whether to try fewer, if these do not fit.

        Returns:
            The number of prompts, 0 if none fits, and the seconds of their job.
        """
        seconds = 0.0

        def attempt() -> None:
            nonlocal seconds
            seconds = self.job(batch).seconds

        release_memory()
        while batch and not fits_in_memory(attempt):
            batch = batch - 1 if fewer else 0
        release_memory()
        return batch, seconds


class _Marks:
    """Marks points of time without waiting for the device.

    A step of a model over several GPUs ends on the first one, where its logits are copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self.set()

    def set(self) -> None:
        """Marks the present point of the device's work."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter() * 1e3)

    def differences(self) -> list[float]:
        """Waits for the device; returns the milliseconds between marks."""
        synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [end - begin for begin, end in pairs]
