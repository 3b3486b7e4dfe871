"""Runs decode steps of a whole model as one CUDA graph, so that the host never waits.

A step writes the token into the tails, reads packed blocks and tails, and advances the lengths, all
on the device. The host counts tokens itself and packs the block of a full tail after the step. The
graph is captured anew only where a table has outgrown its room.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.energy.gpus import devices_of
from kvquant.models.capturing import capture
from kvquant.models.model_call import cache_argument
from kvquant.models.tensor_parallel import is_shared


@dataclass(frozen=True)
class CapturedStep:
    """A captured graph with its output and the addresses that it reads.

    Attributes:
        graph: The work of one step.
        logits: The output of each replay, `[batch_size, vocab_size]`.
        addresses: Addresses of the tables that the graph reads.
    """

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    addresses: tuple[int, ...]


class GraphedDecoder:
    """Decodes one token per sequence and step over a cache that holds the prompts.

    Args:
        model: The model with kvquant's attention (`load_quantized_model`).
        cache: The cache after the prefill; every sequence must have filled its sinks.
        new_tokens: Number of steps for which to make room, so that no new capture is needed.
        borrowed: Whether the cache keeps this object, which then must not keep the cache alive.

    Attributes:
        positions: int64 `[batch_size, 1]` on the device, positions of the next tokens.

    Raises:
        ValueError: The decode kernel cannot read this cache (`KVQuantCache.step_refusals`), or the
            model is on several devices, or shared by processes.
    """

    def __init__(
        self, model: Any, cache: KVQuantCache, new_tokens: int = 1024, *, borrowed: bool = False
    ) -> None:
        self._model = model
        self._held: Callable[[], KVQuantCache | None]
        self._held = weakref.ref(cache) if borrowed else lambda: cache
        if is_shared(model):
            raise ValueError("model: processes share its heads (tp_plan); call the model instead")
        devices = devices_of(model.parameters())
        if len(devices) > 1:
            raise ValueError("model: a graph holds the work of one GPU; call the model instead")
        device = devices[0]
        steps, refusals = cache.step_tables(device), cache.step_refusals(device)
        if steps is None or refusals:
            told = "cache: the decode kernel does not take it; call the model instead"
            raise ValueError(". ".join((told, *refusals)))
        self._steps = steps
        if cache.window is not None and cache.columns + new_tokens > cache.window:
            raise ValueError(
                f"model: {new_tokens} more tokens exceed its sliding window of {cache.window}; "
                "make room for fewer, or call the model instead"
            )
        batch = len(cache.lengths)
        self._room = new_tokens // cache.layout.block_size + 2
        self._tokens = torch.zeros((batch, 1), dtype=torch.long, device=device)
        # Taken as it is, and read by no layer of a planned step: a mask that transformers made for
        # an eager model could not be captured.
        self._mask = torch.zeros((batch, 1, 1, 1), dtype=torch.bool, device=device)
        lengths = torch.tensor(cache.lengths, device=device)[:, None]
        self.positions = lengths.long()
        self._captured: CapturedStep | None = None

    @property
    def _cache(self) -> KVQuantCache:
        """The cache, which whoever calls :meth:`step` keeps."""
        cache = self._held()
        assert cache is not None
        return cache

    def _work(self) -> torch.Tensor:
        """Runs the model on a plan that reads all lengths on the device; returns logits."""
        plan = self._cache.graph_plan(self._steps, self.positions)
        with self._cache.planned(plan):
            output = self._model(
                input_ids=self._tokens,
                attention_mask=self._mask,
                position_ids=self.positions,
                **cache_argument(self._model, self._cache),
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1]
        self.positions += 1
        return logits

    @torch.inference_mode()
    def ready(self) -> CapturedStep:
        """Updates the tables to the layout and returns a graph that reads them, captured if needed.

        Raises:
            RuntimeError: The step cannot be captured, or memory ran out. The cache is as before.
        """
        with torch.cuda.device_of(self._tokens):  # where the graph is captured and runs
            return self._prepare()

    def _prepare(self) -> CapturedStep:
        cache, layout, captured = self._cache, self._cache.layout, self._captured
        blocks = [len(t) for t in layout.table]
        if captured is None:
            self._steps.reserve(layout, max(blocks) + self._room)
        self._steps.write(layout, blocks, layout.tails)
        arenas = [layer.store.arena_table() for layer in cache.packed]
        rings = cache.reserve_windows()
        read = [t for t in (*arenas, *rings) if t is not None]
        now = (*self._steps.addresses(), *(t.data_ptr() for t in read))
        if captured is None or now != captured.addresses:
            captured = self._captured = None  # frees its memory for the next graph
            captured = self._captured = self._capture(now)
        return captured

    @torch.inference_mode()
    def _capture(self, addresses: tuple[int, ...]) -> CapturedStep:
        """Captures the graph of a step after a warm-up step and resets what both counted."""
        lengths, positions = self._steps.lengths.clone(), self.positions.clone()

        def undo() -> None:  # the next step overwrites the tails
            self._steps.lengths.copy_(lengths)
            self.positions.copy_(positions)

        try:
            graph, logits = capture(self._work, undo)
        except BaseException:
            # Without this the host would take the lengths on the device for its own.
            self._steps.forget()
            self.positions.copy_(positions)
            raise
        return CapturedStep(graph, logits, addresses)

    @torch.inference_mode()
    def replay(self, captured: CapturedStep, tokens: torch.Tensor) -> torch.Tensor:
        """Decodes one token per sequence by the graph that :meth:`ready` returned; see `step`."""
        with torch.cuda.device_of(self._tokens):
            self._tokens.copy_(tokens)
            captured.graph.replay()
            self._cache.count_step(self._steps)  # may pack blocks, by kernels
        return captured.logits

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decodes one token per sequence.

        Args:
            tokens: int64 `[batch_size, 1]`, the next token of each sequence.

        Returns:
            Logits `[batch_size, vocab_size]`, overwritten by the next step.
        """
        return self.replay(self.ready(), tokens)
