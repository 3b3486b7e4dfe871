"""Answers a list of texts over the quantized cache of a model, greedily or by transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from kvquant.errors import OutlierOverflow, UserError
from kvquant.formats.files import is_text
from kvquant.models.generation import check_ids, check_prompts, cut, end_ids, greedy, left_pad
from kvquant.models.model_call import cache_argument
from kvquant.models.oom_retry import in_batches, retry_on_overflow, without_retry
from kvquant.models.prefill_quant import PrefillQuantizedAttention
from kvquant.models.prompt_tokens import prompt_tokens
from kvquant.models.quantized_model import QuantizedModel, as_loaded

Turn = Mapping[str, Any]
Prompt = str | Sequence[Turn]

# Options that mean sampling, so that nobody has to say `do_sample=True` as well.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Options of transformers' generate that have no place here, and what to do instead.
_REFUSED = {
    "input_ids": "give texts as prompts",
    "inputs": "give texts as prompts",
    "inputs_embeds": "call qm.model.generate(..., past_key_values=qm.new_cache())",
    "attention_mask": "it follows from the prompts",
    "past_key_values": "each batch has a cache of the scheme",
    "cache_implementation": "each batch has a cache of the scheme",
    "use_cache": "each batch has a cache of the scheme",
    "generation_config": "give its options by name (they would be overridden)",
    "max_length": "use max_new_tokens",
    "min_length": "use min_new_tokens (it would count padding)",
    "prefix_allowed_tokens_fn": "call qm.model.generate(..., past_key_values=qm.new_cache())",
    "num_return_sequences": "give a prompt several times",
    "pad_token_id": "padding is hidden from the model and from the answers",
    "return_dict_in_generate": "call qm.model.generate(..., past_key_values=qm.new_cache())",
}

# The least value of options that count something, which transformers does not check.
_COUNTS = {"num_beams": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0}


def generate(
    qm: QuantizedModel,
    prompts: Iterable[Prompt],
    max_new_tokens: int = 128,
    *,
    chat: bool = False,
    batch_size: int = 16,
    batch_tokens: int | None = None,
    streamer: Any = None,
    **options: Any,
) -> list[str]:
    """Answers prompts of any lengths, in batches padded on the left.

    The answers are greedy unless options ask for something else. Greedy decoding stores each batch
    in a cache of the scheme and drops finished answers from it, on one GPU by a CUDA graph; the
    model's generation configuration counts for its end tokens alone. With options, transformers'
    `generate` runs over such a cache, with the model's generation configuration. A batch that does
    not fit in the GPU's memory is tried again in halves.

    Args:
        qm: What :func:`kvquant.load` returned, with a tokenizer.
        prompts: Texts; with `chat`, each a user's turn, or a conversation as a list of
            `{"role": ..., "content": ...}`.
        max_new_tokens: Length of the longest answer in tokens.
        chat: Whether to apply the tokenizer's chat template, for instruction-tuned models.
        batch_size: Largest number of prompts in a batch, which have similar lengths.
        batch_tokens: Largest number of prompt tokens in a batch, padding included; None sets no
            limit.
        streamer: A streamer of transformers, such as `TextStreamer(qm.tokenizer,
            skip_prompt=True)`, which shows the answer to a single prompt as it grows. An answer
            that is tried again, with more room for outliers, is shown again from its beginning.
        options: Options of transformers' `generate`, such as `temperature=0.7`, `top_p=0.9`,
            `num_beams=4`, `repetition_penalty=1.1` or `stop_strings=["."]`. Those of sampling
            imply `do_sample=True` and count for nothing with `do_sample=False`;
            `torch.manual_seed` fixes what they draw.

    Returns:
        The answers in the order of the prompts, without the prompts and special tokens.

    Raises:
        UserError: The model was not loaded by :func:`kvquant.load`, there is no tokenizer or chat
            template, a prompt is empty, too long for the model's positions or refused by the
            template, or an option cannot be used here.
        NonFinite: Logits that decide a token are NaN or infinite (greedy decoding).
    """
    for name, count in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        _whole(name, count)
    if batch_tokens is not None and _whole("batch_tokens", batch_tokens) < 1:
        raise UserError(f"batch_tokens: {batch_tokens} leaves no room for a prompt; at least 1")
    if as_loaded(qm).approximates and not isinstance(
        qm.model.model.layers[0].self_attn, PrefillQuantizedAttention
    ):
        raise UserError("qm: its model was unwrapped; give the model to kvquant.load again")
    ids = tokenized(qm.tokenizer, prompts, chat)
    check_ids(qm.model, ids)
    if streamer is not None and len(ids) != 1:
        raise UserError(
            f"streamer: shows one answer, and there are {len(ids)} prompts; leave it out"
        )
    for name, instead in _REFUSED.items():
        if name in options:
            raise UserError(f"{name}: is no option of kvquant.generate; {instead}")
    options = {name: value for name, value in options.items() if value is not None}
    for name, least in _COUNTS.items():
        if name in options and _whole(name, options[name]) < least:
            raise UserError(f"{name}: must be at least {least}, got {options[name]}")
    draws = options.pop("do_sample", any(name in options for name in _SAMPLING))
    if draws not in (True, False):
        raise UserError(f"do_sample: must be True or False, got {draws!r}")
    if draws:
        options["do_sample"] = True
    else:
        options = {name: value for name, value in options.items() if name not in _SAMPLING}
    limits: dict[str, Any] = {"batch_size": batch_size, "batch_tokens": batch_tokens}
    if options and max_new_tokens:
        tokens = _by_transformers(qm, ids, max_new_tokens, options, streamer, **limits)
    elif streamer is not None:
        streamed = _Streamed(streamer, ids[0])
        try:
            tokens = greedy(qm, ids, max_new_tokens, stop=streamed, **limits).tokens
        except BaseException:
            streamed.restart()
            raise
        streamer.end()
    else:
        tokens = greedy(qm, ids, max_new_tokens, **limits).tokens
    return [str(qm.tokenizer.decode(answer, skip_special_tokens=True)) for answer in tokens]


class _Streamed:
    """Gives a streamer the tokens of an answer, as a rule of :func:`greedy` that never ends it.

    Args:
        streamer: The streamer.
        prompt: Token ids of the prompt, which streamers get first.
    """

    def __init__(self, streamer: Any, prompt: list[int]) -> None:
        self._streamer, self._prompt = streamer, prompt
        self._shown = 0

    def __call__(self, answer: list[int]) -> bool:
        """Streams the new tokens of an answer."""
        if len(answer) <= self._shown:  # it is tried again
            self.restart()
        if self._shown == 0:
            self._streamer.put(torch.tensor([self._prompt]))
        for token in answer[self._shown :]:
            self._streamer.put(torch.tensor([token]))
        self._shown = len(answer)
        return False

    def restart(self) -> None:
        """Ends what is shown so far, if anything is."""
        if self._shown:
            self._streamer.end()
        self._shown = 0


def _whole(name: str, count: Any) -> int:
    """Returns a whole number, and refuses anything else that was given as one."""
    if not isinstance(count, Integral) or isinstance(count, bool):
        raise UserError(f"{name}: must be a whole number, got {count!r}")
    return int(count)


def tokenized(tokenizer: Any, prompts: Iterable[Prompt], chat: bool) -> list[list[int]]:
    """Returns the token ids of each prompt.

    Raises:
        UserError: There is no tokenizer or chat template, or a prompt is neither text nor turns
            that the template takes.
    """
    if tokenizer is None:
        raise UserError("tokenizer: is missing; give kvquant.load a tokenizer")
    if isinstance(prompts, str):
        raise UserError("prompts: is one text; give a list of texts")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts: must be a list of texts, got {type(prompts).__name__}")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UserError("chat: the tokenizer has no chat template; leave chat out")
    found = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            text, turns = prompt, [{"role": "user", "content": prompt}]
        elif chat and isinstance(prompt, Sequence) and all(isinstance(t, Mapping) for t in prompt):
            text, turns = "", [dict(turn) for turn in prompt if isinstance(turn, Mapping)]
        else:
            wanted = "a text or a list of turns" if chat else "a text (turns need chat=True)"
            raise UserError(f"prompt {number}: must be {wanted}, got {type(prompt).__name__}")
        if chat:
            text = in_template(tokenizer, turns, f"prompt {number}")
        if not is_text(text):
            raise UserError(f"prompt {number}: holds half of a surrogate pair")
        found.append(prompt_tokens(tokenizer, text, special=not chat))
    return found


def in_template(tokenizer: Any, turns: list[dict[str, Any]], where: str) -> str:
    """Returns a conversation as one text, in which the assistant's next turn has begun.

    Args:
        tokenizer: The tokenizer, which has a chat template.
        turns: The turns.
        where: What messages call them.

    Raises:
        UserError: There is no turn, one has no role, or the template refuses them.
    """
    if not turns:
        raise UserError(f"{where}: has no turns")
    for at, turn in enumerate(turns):
        if not isinstance(turn.get("role"), str):
            raise UserError(f"{where}: turn {at} has no role, such as 'user'")
        if turn.get("content") is None and "tool_calls" not in turn:
            raise UserError(f"{where}: turn {at} has no content")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, which may raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: the chat template refuses its turns ({told})") from None


def _given_ends(given: Any) -> list[int]:
    """Returns the end tokens that the caller gave.

    Raises:
        UserError: They are no ids.
    """
    ids = [given] if isinstance(given, Integral) else given
    if not isinstance(ids, Sequence) or not all(isinstance(one, Integral) for one in ids):
        raise UserError(f"eos_token_id: must be a token id or a list of them, got {given!r}")
    if any(one < 0 for one in ids):
        raise UserError(f"eos_token_id: {given!r} holds a negative id; [] stands for none")
    return [int(one) for one in ids]


def _by_transformers(
    qm: QuantizedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    options: dict[str, Any],
    streamer: Any,
    *,
    batch_size: int,
    batch_tokens: int | None,
) -> list[list[int]]:
    """Returns the new tokens of each prompt from transformers' `generate`.

    Raises:
        UserError: A prompt is empty or too long, or an option is wrong.
    """
    check_prompts(qm, prompts, max_new_tokens, batch_size)
    given = options.get("eos_token_id")
    ends = end_ids(qm) if given is None else _given_ends(given)
    if not ends and ("stop_strings" in options or "stopping_criteria" in options):
        batch_size = 1  # without an end token, an answer in a batch runs on until all have ended
    usual: dict[str, Any] = {"do_sample": False, "pad_token_id": min(ends) if ends else 0}
    if "stop_strings" in options:
        usual["tokenizer"] = qm.tokenizer

    def once(cache: Any, rows: list[int]) -> list[list[int]]:
        ids, mask = left_pad([prompts[row] for row in rows], usual["pad_token_id"], qm.device)
        try:
            found = qm.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                **cache_argument(qm.model, cache),
                **{**usual, **options},
            )
        except OutlierOverflow:
            if streamer is not None:
                streamer.end()
            raise
        return [cut(answer, ends, None)[0] for answer in found[:, ids.shape[1] :].tolist()]

    def work(rows: list[int]) -> list[list[int]]:
        with torch.inference_mode():
            return retry_on_overflow(qm.new_cache, lambda cache: once(cache, rows))

    answers: list[list[int]] = [[] for _ in prompts]
    run = work if qm.share is None else without_retry(work)
    sizes = [len(prompt) for prompt in prompts]
    try:
        for rows, batch in in_batches(sizes, run, batch_size=batch_size, batch_tokens=batch_tokens):
            for row, answer in zip(rows, batch, strict=True):
                answers[row] = answer
    except UserError:
        raise
    except ValueError as error:  # transformers' own words on an option
        told = " ".join(str(error).split())
        raise UserError(f"options: transformers' generate refuses them ({told})") from None
    except (AttributeError, TypeError) as error:  # a value of a type that it does not check
        told = " ".join(f"{type(error).__name__}: {error}".split())
        names = ", ".join(sorted(options.keys() - {"do_sample"})) or "do_sample"
        raise UserError(
            f"options: transformers' generate has no use of {names} as given ({told})"
        ) from error
    return answers
