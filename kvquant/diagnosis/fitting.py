"""Computes how many tokens of a model fit in a GPU's memory with each scheme's cache.

Weights, what the driver and torch's libraries hold, and the activations of one call of the model
are taken off; the rest is for the cache, by the formula of :mod:`kvquant.cache.capacity_formula`,
which `kvquant bench jobs` writes beside what it measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvquant.cache.capacity_formula import model_footprint
from kvquant.cache.memory_formula import Footprint, PackedBlocks
from kvquant.diagnosis.model_facts import CacheFacts
from kvquant.errors import UserError
from kvquant.schemes.packed_blocks import packed_blocks, shape_codec
from kvquant.study.jobs import CONTEXT_CHUNK
from kvquant.study.scheme_kinds import Scheme

# Bytes beside weights, cache and activations, measured on an H200 with models of 7B and 8B shape
# (tests/diagnosis/test_fitting.py compares with what searches of what fits found there).
DRIVER = 800_000_000  # context of the driver and loaded kernels, which torch does not count
LIBRARIES = 1_250_000_000  # torch's libraries, decoding graphs, free memory between allocations
KEY_ROOM = 1.5  # slots over expected key outliers, as the host of a GPU does not wait for them
STEP = 64  # tokens, to which the longest prompt is rounded down


@dataclass(frozen=True)
class Room:
    """The memory of a GPU and what of it is taken.

    Attributes:
        memory: Bytes of the GPU.
        weights: Bytes of the weights.
        reserve: Bytes of driver and libraries.
        facts: The model, whose activations are counted by call.
        itemsize: Bytes of an element of the activations.
        plain: The model as a 16-bit cache sees it, if that holds more heads than a quantized one;
            None: `facts`.
    """

    memory: int
    weights: int
    reserve: int
    facts: CacheFacts
    itemsize: int = 2
    plain: CacheFacts | None = None

    def activations(self, tokens: int) -> int:
        """Returns the bytes that a call holds beside weights and cache.

        Args:
            tokens: Tokens of the call.
        """
        per_token = 4 * self.facts.hidden + 3 * self.facts.widest
        scores = self.facts.heads * tokens**2 * (4 + self.itemsize) if self.facts.eager else 0
        return self.itemsize * per_token * tokens + scores

    def call(self, prompt: int) -> int:
        """Returns the tokens of the largest call with which a prompt of a batch is prefilled.

        It is the whole prompt, but where attention would hold the scores of all its tokens.
        """
        return min(prompt, CONTEXT_CHUNK) if self.facts.eager else prompt

    def for_cache(self, call: int) -> int:
        """Returns the bytes that are left for caches beside a call of some tokens; 0 if none."""
        taken = self.weights + self.reserve + self.activations(call)
        return max(0, self.memory - taken)


@dataclass(frozen=True)
class Fit:
    """What fits with one scheme.

    Attributes:
        bits_per_element: Bits per element of a prompt's keys and values, everything counted.
        bytes_per_token: Bytes of a prompt's cache per token.
        static_bytes: Bytes of tables that all prompts share.
        tokens: Tokens of prompts of the given length, held at once.
        prompts: Whole prompts among them.
        longest: Tokens of the longest single prompt, in calls of `CONTEXT_CHUNK`, at most those
            that the model supports.
        longest_of_batch: The same for each prompt of the given batch; None without one.
        problem: Why nothing is known; empty otherwise.
    """

    bits_per_element: float | None = None
    bytes_per_token: float | None = None
    static_bytes: int | None = None
    tokens: int | None = None
    prompts: int | None = None
    longest: int | None = None
    longest_of_batch: int | None = None
    problem: str = ""


def longest_prompt(nbytes: Callable[[int], int], budget: int, limit: int) -> int:
    """Returns the longest prompt whose bytes do not exceed a budget, by bisection.

    Args:
        nbytes: Bytes of a prompt of so many tokens, which do not fall as it becomes longer.
        budget: Bytes.
        limit: The longest prompt that is asked about.
    """
    if nbytes(limit) <= budget:
        return limit
    low, high = 0, -(-limit // STEP)  # in steps; `high` does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if nbytes(middle * STEP) <= budget:
            low = middle
        else:
            high = middle
    return low * STEP


def _chunked(tokens: int) -> list[list[int]]:
    """Returns the calls in which a long prompt is prefilled."""
    whole, rest = divmod(tokens, CONTEXT_CHUNK)
    return [[CONTEXT_CHUNK]] * whole + ([[rest]] if rest else [])


def _elements(facts: CacheFacts, tokens: int) -> int:
    """Returns the key and value elements of a prompt's tokens that later queries see."""
    seen = facts.full_layers * tokens + sum(min(tokens, w - 1) for w in facts.own_windows)
    return 2 * facts.kv_heads * facts.head_dim * seen


@dataclass(frozen=True)
class _Cache:
    """A scheme's cache of a model, by formula."""

    scheme: Scheme
    facts: CacheFacts
    packed: PackedBlocks | None = None
    shared: int = 0

    def footprint(self, calls: list[list[int]]) -> Footprint | None:
        facts = self.facts
        return model_footprint(
            self.scheme,
            (facts.full_layers, facts.kv_heads, facts.head_dim),
            calls,
            windows=facts.own_windows,
            packed=self.packed,
            shared=self.shared,
            key_room=KEY_ROOM,
        )


def fit(scheme: Scheme, room: Room, prompt: int, batch: int | None = None) -> Fit:
    """Computes what fits with one scheme.

    Args:
        scheme: The scheme.
        room: The memory.
        prompt: Tokens of each prompt.
        batch: Prompts whose longest common length is asked for.
    """
    facts, chunk = room.facts, min(CONTEXT_CHUNK, room.facts.positions)
    if room.plain is not None and not scheme.quantizes:
        facts = room.plain
    try:
        codec = shape_codec(scheme, facts.kv_heads, facts.head_dim)
    except UserError as error:
        return Fit(problem=str(error))
    cache = _Cache(scheme, facts, shared=0 if codec is None else codec.shared_bytes)
    if (whole := cache.footprint([[prompt]])) is None and codec is not None:
        cache = _Cache(scheme, facts, packed_blocks(codec, facts.kv_heads, facts.head_dim))
        whole = cache.footprint([[prompt]])
    if whole is None:
        return Fit(problem="no formula for a cache that is not ours: measure it by `kvquant bench`")
    each = whole.total - whole.tables
    free = max(0, room.for_cache(room.call(prompt)) - whole.tables)
    tokens = free * prompt // each

    def longest(prompts: int) -> int:
        def nbytes(length: int) -> int:
            one = cache.footprint(_chunked(length))
            assert one is not None
            return prompts * (one.total - one.tables) + one.tables

        return longest_prompt(nbytes, room.for_cache(chunk), facts.positions)

    return Fit(
        bits_per_element=8 * whole.total / _elements(facts, prompt),
        bytes_per_token=each / prompt,
        static_bytes=whole.tables,
        tokens=tokens,
        prompts=tokens // prompt,
        longest=longest(1),
        longest_of_batch=None if batch is None else longest(batch),
    )
