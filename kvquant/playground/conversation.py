"""A conversation over one cache that grows turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.errors import OutlierOverflow, UserError
from kvquant.formats.files import is_text
from kvquant.models.generation import check_ids, cut, end_ids
from kvquant.models.model_call import cache_argument
from kvquant.models.text_generation import in_template
from kvquant.runtime.progress import note


@dataclass(frozen=True)
class Turn:
    """A finished turn, and what the cache holds after it.

    Attributes:
        answer: The answer's text.
        new_tokens: Number of its tokens.
        seconds: Time of reading the turn and answering it.
        read: Number of tokens that were read for it, those of the answer left out.
        tokens: Number of tokens in the cache.
        cache_bytes: Bytes that the cache has allocated.
        cache_elements: Number of key and value elements in those bytes.
        ended: Whether the model ended the answer itself.
    """

    answer: str
    new_tokens: int
    seconds: float
    read: int
    tokens: int
    cache_bytes: int
    cache_elements: int
    ended: bool

    @property
    def bits_per_element(self) -> float:
        """Bits that the cache has allocated per key or value element."""
        return 8 * self.cache_bytes / self.cache_elements


class Conversation:
    """Turns of a user and a model over one cache of the scheme.

    A turn reads what is new alone: its own tokens and the end of the answer before it. Where the
    chat template writes earlier turns otherwise than they were read (some leave thoughts out), all
    is read again into a new cache.

    Args:
        qm: A `QuantizedModel` whose tokenizer has a chat template.
        system: A message before the first turn; None: there is none.
        options: Options of transformers' `generate`, such as `temperature`; none: greedy answers.

    Raises:
        UserError: There is no chat template.
    """

    def __init__(
        self, qm: Any, *, system: str | None = None, options: dict[str, Any] | None = None
    ) -> None:
        if not getattr(qm.tokenizer, "chat_template", None):
            raise UserError("--model: its tokenizer has no chat template; use kvquant generate")
        self.qm = qm
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._options = {"do_sample": bool(options), **(options or {})}
        self._ends = end_ids(qm)
        self.reset()

    def reset(self) -> None:
        """Forgets all turns and begins with an empty cache."""
        self._messages: list[dict[str, str]] = list(self._system)
        self._text = ""  # of all turns so far, as the template wrote them and the model answered
        self._ids: list[int] = []  # its tokens; the cache holds all but the last few of them
        self._cache = self.qm.new_cache()

    def ask(
        self, text: str, max_new_tokens: int, *, streamer: Any = None, stop: Any = None
    ) -> Turn:
        """Answers a turn.

        Args:
            text: What the user says.
            max_new_tokens: Length of the longest answer in tokens, which also ends where the
                model's positions do.
            streamer: A streamer of transformers, which gets the tokens of the answer.
            stop: Called between tokens; the answer ends where it returns True.

        Raises:
            UserError: The template refuses the turn, it is no text, or the model has no position
                left for an answer. The conversation then is as it was before the turn.
        """
        start = time.monotonic()
        messages = [*self._messages, {"role": "user", "content": text}]
        written = in_template(self.qm.tokenizer, messages, "conversation")
        if not is_text(written):
            raise UserError("conversation: holds half of a surrogate pair, which is no text")
        goes_on = bool(self._text) and written.startswith(self._text)
        ids = self._ids if goes_on else []
        ids = ids + self._tokens(written[len(self._text) if goes_on else 0 :])
        check_ids(self.qm.model, [ids])
        room = self.qm.position_limit - len(ids)
        if room < 1:
            raise UserError(
                f"conversation: {len(ids):,} tokens, but the model has "
                f"{self.qm.position_limit:,} positions; /reset begins anew"
            )
        if not goes_on:
            self._cache = self.qm.new_cache()
        held = self._held
        try:
            found = self._answered(ids, min(max_new_tokens, room), streamer, stop)
        except BaseException:  # a cache whose call ended early takes no other; all is read again
            self._cache = self.qm.new_cache()
            raise
        answer, ended = cut(found[len(ids) :], self._ends, None)
        said = str(self.qm.tokenizer.decode(answer, skip_special_tokens=True))
        self._messages = [*messages, {"role": "assistant", "content": said}]
        self._text, self._ids = written + said, ids + answer
        return Turn(
            answer=said,
            new_tokens=len(answer),
            seconds=time.monotonic() - start,
            read=len(ids) - held,
            tokens=self._held,
            cache_bytes=cache_nbytes(self._cache),
            cache_elements=cache_elements(self._cache),
            ended=ended,
        )

    @property
    def _held(self) -> int:
        """Number of tokens in the cache."""
        return int(self._cache.get_seq_length())

    def _tokens(self, text: str) -> list[int]:
        return list(self.qm.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _answered(
        self,
        ids: list[int],
        max_new_tokens: int,
        streamer: Any,
        stop: Callable[[], bool] | None,
    ) -> list[int]:
        """Returns the tokens of the conversation with its new answer.

        Where a cache had too little room for outliers, all is read again into one with more.
        """
        from transformers import StoppingCriteriaList

        qm = self.qm
        inputs = torch.tensor([ids], device=qm.device)
        criteria = StoppingCriteriaList([] if stop is None else [_Stopped(stop)])
        while True:
            try:
                with torch.inference_mode():
                    found = qm.model.generate(
                        input_ids=inputs,
                        attention_mask=torch.ones_like(inputs),
                        max_new_tokens=max_new_tokens,
                        streamer=streamer,
                        stopping_criteria=criteria,
                        pad_token_id=min(self._ends, default=0),
                        **cache_argument(qm.model, self._cache),
                        **self._options,
                    )
                settle = getattr(self._cache, "settle", None)
                if settle is not None:
                    settle()
                return [int(token) for token in found[0].tolist()]
            except OutlierOverflow:
                if streamer is not None:
                    streamer.end()
                note("reading the conversation again with more room for outliers")
                self._cache.widen()
                self._cache = qm.new_cache()


class _Stopped:
    """Ends an answer where a function says so, as a stopping criterion of transformers.

    Args:
        stop: Returns True where the answer ends.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """Returns whether each sequence ends, bool `[batch_size]`."""
        return torch.full((len(input_ids),), self._stop(), device=input_ids.device)
