"""Greedy generation for batches of prompts of different lengths, from any scheme's cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.cache.fp16_layer import Fp16Layer, Fp16WindowLayer
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.errors import OutlierOverflow, UserError
from kvquant.models.finite import not_finite
from kvquant.models.graph_decoding import GraphedDecoder
from kvquant.models.model_call import cache_argument
from kvquant.models.oom_retry import in_batches, out_of_memory, retry_on_overflow, without_retry
from kvquant.models.sdpa import without_cudnn
from kvquant.runtime.progress import note

# Steps between looks at the tokens on a GPU, because each look makes the host wait.
CHECK_EVERY_CUDA = 8
# Fraction of ended answers at which they leave the batch, which copies an unquantized cache.
ENDED_SHARE = 0.25
# Fewest new tokens for a CUDA graph, as capturing costs about as much as so many steps without.
MIN_GRAPH_STEPS = 64

Stop = Callable[[list[int]], bool]


class _NoGraph(Exception):
    """Raised when a CUDA graph of the decode steps cannot be captured or replayed."""


@dataclass(frozen=True)
class GenerationResult:
    """Holds the answers of :func:`greedy` in the order of the prompts.

    Attributes:
        tokens: New tokens of each prompt, without the end token.
        prompt_tokens: Number of tokens of all prompts.
        row_bytes: Cache bytes of each prompt after the prefill: its batch's, divided by tokens.
        row_elements: Number of key and value elements of each prompt's tokens in those bytes.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    row_bytes: list[int]
    row_elements: list[int]

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of all batches had allocated after their prefill."""
        return sum(self.row_bytes)

    @property
    def cache_elements(self) -> int:
        """Number of key and value elements of the prompts' tokens in those bytes."""
        return sum(self.row_elements)


def end_ids(qm: Any) -> list[int]:
    """Returns the ids of end tokens, from the generation configuration or the tokenizer.

    Ids that the model cannot give, such as -1 for "none", are left out.
    """
    config = getattr(qm.model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = qm.tokenizer.eos_token_id
    if ids is None:
        return []
    size = int(qm.model.config.vocab_size)
    return [one for one in ([ids] if isinstance(ids, int) else ids) if 0 <= one < size]


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns left-padded input ids and attention mask, int64 `[batch_size, longest]` each."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def cut(
    tokens: list[int], eos_ids: Collection[int], stop: Stop | None, start: int = 0
) -> tuple[list[int], bool]:
    """Returns an answer up to its end, and whether it has ended.

    The end is the first end token, which is dropped, or the first prefix for which `stop` is true,
    which is kept. How far a batch continued after the end therefore does not matter.

    Args:
        tokens: The answer so far.
        eos_ids: Ids of end tokens.
        stop: Returns True for an answer that needs no further token.
        start: Number of leading tokens that are known to hold no end.
    """
    for at in range(start, len(tokens)):
        if tokens[at] in eos_ids:
            return tokens[:at], True
        if stop is not None and stop(tokens[: at + 1]):
            return tokens[: at + 1], True
    return tokens, False


def check_ids(model: Any, prompts: Iterable[Sequence[int]], field: str = "tokenizer") -> None:
    """Refuses token ids for which a model has no embedding, as those of another tokenizer.

    Args:
        model: A causal LM.
        prompts: Token ids of each prompt.
        field: What messages name.

    Raises:
        UserError: An id is too large.
    """
    size = int(model.config.vocab_size)
    most = max((max(prompt, default=0) for prompt in prompts), default=0)
    if most >= size:
        raise UserError(
            f"{field}: gives the id {most}, and the model has {size} tokens: it is another model's"
        )


def check_prompts(
    qm: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> None:
    """Refuses prompts that cannot be answered.

    Args:
        qm: A `kvquant.models.loading.QuantizedModel`.
        prompts: Token ids of each prompt.
        max_new_tokens: Length of the longest answer in tokens.
        batch_size: Largest number of prompts in a batch.

    Raises:
        UserError: A prompt is empty or does not fit the model's positions, or a number is too
            small.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index}: is empty")
        if len(prompt) + max_new_tokens > qm.position_limit:
            raise UserError(
                f"prompt {index}: {len(prompt)} tokens and {max_new_tokens} of answer, but the "
                f"model has {qm.position_limit} positions"
            )
    if max_new_tokens < 0 or batch_size < 1:
        raise UserError("max_new_tokens must not be negative, batch_size must be at least 1")


def greedy(
    qm: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    eos_ids: Collection[int] | None = None,
    stop: Stop | None = None,
    protocol: str = "A",
    on_batch: Callable[[int], None] | None = None,
    graph: bool = True,
    unquantized: bool = False,
) -> GenerationResult:
    """Generates greedy answers, by one prefill per batch and single-token steps on its cache.

    Args:
        qm: A `kvquant.models.loading.QuantizedModel`.
        prompts: Token ids of each prompt.
        max_new_tokens: Length of the longest answer in tokens.
        batch_size: Largest number of prompts in a batch, which have similar lengths.
        batch_tokens: Largest number of prompt tokens in a batch, padding included; None sets no
            limit. A longer prompt is a batch of its own.
        eos_ids: Ids of end tokens; None takes the model's own.
        stop: Returns True for an answer (its tokens so far) that needs no further token.
        protocol: Protocol of the caches, "A" or "B".
        on_batch: Called with the number of finished prompts after each batch.
        graph: Whether to decode long answers by a CUDA graph where possible (:func:`graphed`).
        unquantized: Whether to answer from the unquantized cache in place of the scheme's.

    Raises:
        UserError: A prompt is empty or does not fit the model's positions.
        NonFinite: Logits that decide a token are NaN or infinite.
    """
    check_prompts(qm, prompts, max_new_tokens, batch_size)
    ends = frozenset(end_ids(qm) if eos_ids is None else eos_ids)
    sizes = [len(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    row_bytes, row_elements = [0] * len(prompts), [0] * len(prompts)

    def work(rows: list[int]) -> GenerationResult:
        nonlocal graph
        batch = [prompts[row] for row in rows]
        if graph:
            try:
                return _batch(qm, batch, max_new_tokens, ends, stop, protocol, True, unquantized)
            except _NoGraph as error:
                note(f"decoding without a CUDA graph: {error}")
                graph = False
        return _batch(qm, batch, max_new_tokens, ends, stop, protocol, False, unquantized)

    done = 0
    shared = getattr(qm, "share", None) is not None
    run = without_retry(work) if shared else work
    for rows, found in in_batches(sizes, run, batch_size=batch_size, batch_tokens=batch_tokens):
        for at, row in enumerate(rows):
            answers[row] = found.tokens[at]
            row_bytes[row], row_elements[row] = found.row_bytes[at], found.row_elements[at]
        done += len(rows)
        if on_batch is not None:
            on_batch(done)
    return GenerationResult(answers, sum(sizes), row_bytes, row_elements)


def share_out(total: int, weights: Sequence[int]) -> list[int]:
    """Returns integers in proportion to `weights` whose sum is exactly `total`."""
    whole, seen, given = sum(weights), 0, 0
    shares = []
    for weight in weights:
        seen += weight
        shares.append(total * seen // whole - given)
        given += shares[-1]
    return shares


def can_drop_rows(cache: Any) -> bool:
    """Returns whether a cache can drop sequences; transformers' own quantized layers cannot."""
    if isinstance(cache, KVQuantCache):
        return True
    return all(type(layer) in (Fp16Layer, Fp16WindowLayer) for layer in cache.layers)


def graphed(qm: Any, cache: Any, new_tokens: int) -> GraphedDecoder | None:
    """Captures the decode steps of a cache as a CUDA graph, or returns None if that cannot pay."""
    if new_tokens < MIN_GRAPH_STEPS or qm.device.type != "cuda":
        return None
    if not isinstance(cache, KVQuantCache):
        return None
    try:
        return GraphedDecoder(qm.model, cache, new_tokens)
    except ValueError:  # the decode kernel does not take this cache
        return None


@torch.inference_mode()
def _batch(
    qm: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: frozenset[int],
    stop: Stop | None,
    protocol: str,
    graph: bool,
    unquantized: bool = False,
) -> GenerationResult:
    make = qm.baseline_cache if unquantized else lambda: qm.new_cache(protocol)

    def work(cache: Any) -> GenerationResult:
        return _answer(qm, cache, prompts, max_new_tokens, ends, stop, graph)

    return retry_on_overflow(make, work)


def _answer(
    qm: Any,
    cache: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: frozenset[int],
    stop: Stop | None,
    graph: bool,
) -> GenerationResult:
    device = qm.device
    pad_id = min(ends) if ends else 0  # any id will do, as the mask hides it
    ids, mask = left_pad(prompts, pad_id, device)
    lengths = mask.sum(1, keepdim=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # The mask of all steps is built once, and each step takes a longer slice of it.
    steps = mask.new_ones((len(prompts), max_new_tokens))
    full_mask = torch.cat((mask, steps), dim=1)
    width = ids.shape[1]
    logits = qm.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **cache_argument(qm.model, cache),
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    sizes = [len(prompt) for prompt in prompts]
    row_bytes = share_out(cache_nbytes(cache), sizes)
    row_elements = share_out(cache_elements(cache, mask), sizes)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # other processes may use what only the prefill needed
    decoder = graphed(qm, cache, max_new_tokens) if graph else None
    if decoder is None and isinstance(cache, KVQuantCache):
        cache.graphs = False  # short answers end before a graph would pay
    check_every = CHECK_EVERY_CUDA if device.type == "cuda" else 1
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    rows = list(range(len(prompts)))  # the prompts in the cache, in its order
    news: list[torch.Tensor] = []  # their tokens that the host has not seen, `[rows, 1]` each
    tops: list[torch.Tensor] = []  # the logits of these tokens, `[rows, 1]` each
    for step in range(max_new_tokens):
        token = logits.argmax(-1, keepdim=True)
        news.append(token)
        tops.append(logits.gather(-1, token))  # argmax treats NaN as the greatest
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % check_every == 0:
            _collect(qm, answers, rows, news, tops, ends, stop, ended)
            going = [i for i, row in enumerate(rows) if not ended[row]]
            if not going:
                break
            leave = len(rows) - len(going) >= ENDED_SHARE * len(rows)
            # A graph is captured for a fixed number of rows, and its steps are cheap anyway.
            if leave and decoder is None and can_drop_rows(cache):
                chosen = torch.tensor(going, device=device)
                cache.batch_select_indices(chosen)
                full_mask, lengths, token = full_mask[chosen], lengths[chosen], token[chosen]
                rows = [rows[i] for i in going]
        if decoder is not None:
            logits = _replay(decoder, token)
            continue
        with without_cudnn():
            logits = qm.model(
                input_ids=token,
                attention_mask=full_mask[:, : width + step + 1],
                position_ids=lengths + step,
                **cache_argument(qm.model, cache),
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
    _collect(qm, answers, rows, news, tops, ends, stop, ended)
    return GenerationResult(answers, sum(sizes), row_bytes, row_elements)


def _replay(decoder: GraphedDecoder, token: torch.Tensor) -> torch.Tensor:
    """Replays one step of a graph; a failure other than out of memory leads to a retry without."""
    try:
        return decoder.step(token)
    except OutlierOverflow:
        raise
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise _NoGraph(str(error).partition("\n")[0]) from None


def _collect(
    qm: Any,
    answers: list[list[int]],
    rows: list[int],
    news: list[torch.Tensor],
    tops: list[torch.Tensor],
    ends: frozenset[int],
    stop: Stop | None,
    ended: list[bool],
) -> None:
    """Copies new tokens to the host, appends them to the answers and cuts ended answers.

    Raises:
        NonFinite: The greatest logit of a token is NaN or infinite. Tokens after the end of an
            answer do not count.
    """
    if not news:
        return
    finite = torch.cat(tops, dim=1).isfinite().tolist()
    for at, (row, tokens) in enumerate(zip(rows, torch.cat(news, dim=1).tolist(), strict=True)):
        if ended[row]:
            continue
        known = len(answers[row])
        answers[row], ended[row] = cut(answers[row] + tokens, ends, stop, known)
        counted = finite[at][: len(answers[row]) - known + 1]  # the end token, if any, is one more
        if not all(counted):
            raise not_finite(qm, f"logits of step {known + counted.index(False)} of an answer")
    news.clear()
    tops.clear()
