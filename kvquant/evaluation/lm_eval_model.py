"""`kvquant` as a model of lm-eval: any of its text tasks over a quantized cache.

lm-eval 0.4.13 finds a model by name in a registry that is filled by importing modules; it has no
entry points and no option that names a module. So this module registers itself when imported and
starts lm-eval's own command line:

    python -m kvquant.evaluation.lm_eval_model --model kvquant \\
        --model_args pretrained=DIR,scheme=nuq3-1pct,quantizer=FILE --tasks ...

Protocol A is the default: a question's prompt fills the cache and the continuation, or each
generated token, reads it. Protocol B scores prompt and continuation in one forward pass in which
every token attends to quantized keys and values.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import TypeAdapter, ValidationError

from kvquant.cache import Protocol
from kvquant.config import SchemeSpec, load_study
from kvquant.errors import UserError
from kvquant.generation import end_ids, greedy
from kvquant.model_call import cache_argument
from kvquant.models import load_quantized_model
from kvquant.quantizer_file import read_quantizer, scheme_of
from kvquant.specs import needs_calibration

NAME = "kvquant"
DEFAULT_NEW_TOKENS = 256
GREEDY_ONLY = "model kvquant: answers are greedy; do_sample and temperature must not ask for more"


def find_scheme(scheme: str | None, quantizer: str | None, study: str | None) -> SchemeSpec:
    """A scheme by name: of a study file, of a quantizer.json, or `fp16` and `kivi-BITS`.

    Raises:
        UserError: The name is not known there, or the scheme needs a quantizer and has none.
    """
    if scheme is None and quantizer is None:
        scheme = "fp16"
    if study is not None and scheme is not None:
        found: SchemeSpec = load_study(study).scheme(scheme)
    elif quantizer is not None:
        built = read_quantizer(Path(quantizer))
        if scheme not in (None, built.scheme):
            raise UserError(f"scheme: '{scheme}', but {quantizer} is for '{built.scheme}'")
        found = scheme_of(Path(quantizer), built)
    else:
        assert scheme is not None
        kind, _, bits = scheme.partition("-")
        raw = {"kind": kind, "bits": int(bits)} if bits.isdigit() else {"kind": kind}
        try:
            found = TypeAdapter(SchemeSpec).validate_python(raw)
        except ValidationError:
            raise UserError(
                f"scheme: '{scheme}' is only known with study=FILE or quantizer=FILE"
            ) from None
    if needs_calibration(found) and quantizer is None:
        raise UserError(f"quantizer: scheme '{scheme}' needs quantizer=FILE")
    return found


class KVQuantLM(TemplateLM):  # type: ignore[misc]
    """One model with the cache of one scheme."""

    def __init__(
        self,
        pretrained: str,
        scheme: str | None = None,
        quantizer: str | None = None,
        study: str | None = None,
        protocol: Protocol = "A",
        max_length: int | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: Directory or hub id.
            scheme: Name of the scheme (see :func:`find_scheme`); None: the quantizer's, else fp16.
            quantizer: quantizer.json, for schemes that need calibration.
            study: A study file that holds the scheme.
            protocol: "A" or "B", for the scoring of continuations; answers are always A.
            max_length: Longest prompt and answer; default: the model's positions.
            batch_size: Prompts that are answered together.
            max_batch_size: Given by lm-eval, not used.
            device: "cpu", "cuda" or "auto".
        """
        super().__init__()
        if protocol not in ("A", "B"):
            raise UserError(f"protocol: must be A or B (got '{protocol}')")
        if not str(batch_size or 1).isdigit() or int(batch_size or 1) < 1:
            raise UserError(f"batch_size: must be a positive number (got '{batch_size}')")
        spec = find_scheme(scheme, quantizer, study)
        self._name = pretrained
        self.qm = load_quantized_model(
            pretrained,
            spec,
            quantizer=quantizer if needs_calibration(spec) else None,
            device=device or "auto",
        )
        self.tokenizer = self.qm.tokenizer
        self.protocol = protocol
        self.batch_size = int(batch_size or 1)
        self.max_length = min(int(max_length or self.qm.max_positions), self.qm.max_positions)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ids = end_ids(self.qm)
        return ids[0] if ids else 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's caches."""
        return self._name.replace("/", "__")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.qm.device

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; a text that starts with the BOS token, as a chat turn may, gets no second."""
        special = add_special_tokens
        if special is None:
            bos = self.tokenizer.bos_token
            special = not (bos and string.startswith(bos))
        found = self.tokenizer(string, add_special_tokens=special, verbose=False)
        return list(found.input_ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one prompt."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(f"{self._name}: the tokenizer has no chat template")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, for lm-eval's record; None where none is asked for."""
        return self.tokenizer.chat_template if chat_template else None

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log likelihood of a continuation, and whether greedy decoding would give it."""
        tokens = (context + continuation)[-(self.max_length + 1) :]
        count = min(len(continuation), len(tokens) - 1)
        ids = torch.tensor([tokens[:-1]], device=self.qm.device)
        goal = torch.tensor(tokens[-count:], device=self.qm.device)
        cache = self.qm.new_cache(self.protocol)
        decoder = self.qm.model.model
        with torch.inference_mode():
            # The last token of the context asks for the first of the continuation.
            past = ids.shape[1] - count if self.protocol == "A" else 0
            given = {**cache_argument(decoder, cache), "use_cache": True}
            if past > 0:
                decoder(input_ids=ids[:, :past], **given)
            hidden = decoder(input_ids=ids[:, past:], **given)
            head = self.qm.model.get_output_embeddings()
            logits = head(hidden.last_hidden_state[0, -count:]).float().log_softmax(-1)
            chosen = logits.gather(1, goal[:, None]).sum()
        return float(chosen), bool((logits.argmax(-1) == goal).all())

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores of (texts, context tokens, continuation tokens)."""
        found = []
        for texts, context, continuation in requests:
            found.append(self._score(context, continuation))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of whole texts, in lm-eval's windows."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first stop text, left out; prompts keep their last tokens."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") and options.get("temperature", 1.0):
                raise UserError(GREEDY_ONLY)
            until = options.get("until") or []
            stops = tuple([until] if isinstance(until, str) else until)
            room = int(options.get("max_gen_toks") or DEFAULT_NEW_TOKENS)
            groups.setdefault((room, stops), []).append(index)
        answers = [""] * len(requests)
        for (room, stops), members in groups.items():
            limit = self.max_length - room
            if limit < 1:
                raise UserError(f"max_gen_toks: {room}, but the longest text is {self.max_length}")
            members.sort(key=lambda index: len(requests[index].args[0]))
            prompts = [self.tok_encode(requests[i].args[0])[-limit:] for i in members]
            found = greedy(
                self.qm,
                [prompt or [self.prefix_token_id] for prompt in prompts],
                room,
                batch_size=self.batch_size,
                stop=functools.partial(self._stopped, stops),
            )
            for index, tokens in zip(members, found.tokens, strict=True):
                text = self._decode(tokens)
                for stop in filter(None, stops):
                    text = text.split(stop)[0]
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _stopped(self, stops: tuple[str, ...], tokens: list[int]) -> bool:
        return any(stop in self._decode(tokens) for stop in stops if stop)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


if NAME not in model_registry:
    register_model(NAME)(KVQuantLM)


def main() -> int:
    """lm-eval's command line with the model `kvquant`; bad input is told in a line, as by kvquant.

    Returns 0, or 2 after bad input.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"kvquant: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # As a script this module is `__main__`; the model is registered by its importable twin.
    sys.exit(main())
