r"""`kvquant` as a model of lm-eval: any of its text tasks over a quantized cache.

lm-eval 0.4.13 finds a model by name in a registry that imported modules fill, without entry points
or an option that names a module. This module therefore registers itself when imported and starts
lm-eval's own command line:

    python -m kvquant.evaluation.lm_eval_model --model kvquant \
        --model_args pretrained=DIR,scheme=nuq3-1pct,quantizer=FILE --tasks ...

In protocol A, the default, a prompt fills the cache, which the continuation or each generated token
reads. Protocol B scores prompt and continuation in one forward pass, in which every token attends
to quantized keys and values.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import jinja2
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvquant.cache.attending import Protocol
from kvquant.errors import UserError
from kvquant.evaluation.chat import has_template, with_fixed_day
from kvquant.evaluation.likelihood import score
from kvquant.evaluation.lm_eval_options import (
    AnswerOptions,
    checkpoint_dtype,
    find_scheme,
    finish,
    read_answer_options,
    read_batch_size,
    read_dtype,
    read_mapping,
    read_tokenizer,
    refuse_unknown,
)
from kvquant.fetch.lm_eval_files import check_version
from kvquant.models.generation import end_ids, greedy
from kvquant.models.loading import load_quantized_model
from kvquant.models.prompt_tokens import prompt_tokens
from kvquant.runtime.progress import note
from kvquant.study.models import DATE_STRING, parse_day
from kvquant.study.scheme_kinds import PromptAttention

NAME = "kvquant"


class KVQuantLM(TemplateLM):  # type: ignore[misc]
    """Runs a model with a scheme's cache, with the options and meanings of lm-eval's `hf`."""

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
        *,
        prompt_attention: PromptAttention | None = None,
        tokenizer: Any = None,
        truncation: bool | None = False,
        logits_cache: bool = True,
        dtype: str | torch.dtype | None = None,
        softmax_dtype: str | torch.dtype | None = None,
        use_fast_tokenizer: bool | None = True,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: Folder or hub id of the model.
            scheme: Name of the scheme (see :func:`find_scheme`).
            quantizer: quantizer.json, for schemes that need calibration.
            study: A study file that holds the scheme.
            protocol: "A" or "B", for scoring continuations; answers always use A.
            max_length: Largest number of tokens of prompt and answer; by default the model's
                positions, scaled ones included.
            batch_size: Number of prompts per batch; "auto" takes `max_batch_size` and halves it
                when memory runs out.
            max_batch_size: Batch size for "auto", 64 by default.
            device: "cpu", "cuda" or "auto".
            prompt_attention: "8-bit" or "16-bit", for prompts; by default as the scheme says.
            tokenizer: Folder, hub id or object of another tokenizer.
            truncation: Whether the tokenizer cuts prompts to its own `model_max_length`.
            logits_cache: Accepted without effect, as every continuation is scored by itself.
            dtype: dtype of the weights; by default the library's own, with "auto" the checkpoint's.
            softmax_dtype: dtype of the log likelihoods, fp32 by default.
            use_fast_tokenizer: Whether to use the fast tokenizer.
            add_bos_token: Whether texts get the tokenizer's special tokens; by default the
                tokenizer decides.
            prefix_token_id: Token before a text without context; by default BOS, else EOS.
            think_end_token: Token or text after whose last occurrence an answer begins.
            enable_thinking: Variable of the chat template; True needs `think_end_token`.
            chat_template_args: Further variables of the chat template.
            others: Options of `hf` that this model lacks, at their defaults.

        Raises:
            UserError: An option is unknown, has a wrong value or does not fit the model.
        """
        check_version()
        super().__init__()
        refuse_unknown(others, KNOWN)
        if protocol not in ("A", "B"):
            raise UserError(f"protocol: must be A or B (got '{protocol}')")
        if enable_thinking and think_end_token is None:
            raise UserError("enable_thinking: set think_end_token, after which answers begin")
        self.batch_size = read_batch_size(batch_size, max_batch_size)
        self.softmax_dtype = read_dtype("softmax_dtype", softmax_dtype) or torch.float32
        self.chat_template_args = read_mapping("chat_template_args", chat_template_args)
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self.enable_thinking = enable_thinking
        digits = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token) if digits else think_end_token  # type: ignore[arg-type]
        spec = find_scheme(scheme, quantizer, study)
        self._name = str(pretrained)
        self.qm = load_quantized_model(
            pretrained,
            spec,
            quantizer=quantizer if spec.registration.calibrated else None,
            device=device or "auto",
            dtype=checkpoint_dtype(pretrained) if dtype == "auto" else read_dtype("dtype", dtype),
            prompt_attention=prompt_attention,
        )
        self.tokenizer = self.qm.tokenizer
        if tokenizer or add_bos_token is not None or not use_fast_tokenizer:
            chosen = {"use_fast": bool(use_fast_tokenizer)}
            if add_bos_token is not None:
                chosen["add_bos_token"] = add_bos_token
            self.tokenizer = read_tokenizer(tokenizer or pretrained, chosen)
        self.protocol, self.add_bos_token = protocol, add_bos_token
        self.truncation, self.custom_prefix_token_id = bool(truncation), prefix_token_id
        limit = self.qm.position_limit
        self.max_length = limit if max_length is None else int(max_length)
        if not 1 <= self.max_length <= limit:
            raise UserError(f"max_length: {max_length}, but the model has {limit} positions")
        penalty = getattr(self.qm.model.generation_config, "repetition_penalty", None)
        if penalty not in (None, 1.0):
            note(f"generation_config.json: repetition_penalty {penalty} is not applied")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ids = [self.tokenizer.eos_token_id, *end_ids(self.qm)]
        found = [int(token) for token in ids if token is not None]
        if not found:
            raise UserError(f"{self._name}: neither tokenizer nor model has an end token")
        return found[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context.

        Raises:
            UserError: The tokenizer has neither BOS nor EOS, and no token was given.
        """
        own = (
            self.custom_prefix_token_id,
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
        )
        found = next((token for token in own if token is not None), None)
        if found is None:
            raise UserError(
                f"prefix_token_id: the tokenizer of {self._name} has no BOS or EOS: set it"
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which lm-eval uses in the names of its caches."""
        return self._name.replace("/", "__")

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.qm.device

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Returns token ids, without a second prefix token if the text starts with one."""
        special = add_special_tokens
        if special is None:
            special = self.add_bos_token is not False and not self._starts_with_prefix(string)
        found = prompt_tokens(self.tokenizer, string, special=special)
        return found[-left_truncate_len:] if left_truncate_len else found

    def _starts_with_prefix(self, string: str) -> bool:
        ids = (
            self.custom_prefix_token_id,
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
        )
        prefix = next((token for token in ids if token is not None), None)
        return prefix is not None and string.startswith(str(self.tokenizer.decode([prefix])))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as one prompt, with a fixed date in templates that write one."""
        if not has_template(self.tokenizer):
            raise UserError(f"{self._name}: the tokenizer has no chat template")
        day = parse_day(self.chat_template_args.get("date_string", DATE_STRING))
        template = with_fixed_day(self.tokenizer.get_chat_template(), day)

        def render(turns: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **self.chat_template_args,
                )
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            note("the chat template refuses the system turn, which is left out")
            return render([turn for turn in chat_history if turn["role"] != "system"])

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns log likelihoods of continuations and whether they are the greedy ones.

        Raises:
            UserError: A continuation is empty, or thinking is enabled.
        """
        if self.enable_thinking:
            raise UserError("enable_thinking: is for tasks with generated answers only")
        for request in requests:
            if not request.args[1]:
                raise UserError("loglikelihood: a continuation is empty, so there is no score")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Returns the log likelihood of a continuation and whether it is the greedy one."""
        count = len(continuation)
        if not context or not count:
            raise UserError("loglikelihood: a continuation adds no token, so there is no score")
        if count > self.max_length:
            raise UserError(
                f"max_length: {self.max_length}, but a continuation alone has {count} tokens"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return score(self.qm, self.protocol, tokens, count, self.softmax_dtype)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores requests of (texts, context tokens, continuation tokens)."""
        found = []
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        self._note_cut(lengths, self.max_length)
        for texts, context, continuation in requests:
            found.append(self._score(context, continuation))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def _note_cut(self, lengths: list[int], limit: int) -> None:
        """Notes how many prompts lose their beginning."""
        if cut := [length for length in lengths if length > limit]:
            note(
                f"{len(cut)} of {len(lengths)} prompts, of up to {max(cut)} tokens, keep their "
                f"last {limit} (max_length {self.max_length})"
            )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns log likelihoods of whole texts, computed in lm-eval's windows.

        The windows add the prefix token, so texts are encoded without one, as by `hf` with
        `add_bos_token=False`. Otherwise `hf` predicts BOS from BOS and counts it.
        """
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:  # the text contains its own
                tokens = tokens[1:]
            windows = get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens of a prompt as `hf` encodes it for generation."""
        bos = self.tokenizer.bos_token
        own = True if self.add_bos_token is None else self.add_bos_token
        special = own and not (bos and text.startswith(bos))
        found = prompt_tokens(self.tokenizer, text, special=special, truncation=self.truncation)
        return found or [self.prefix_token_id]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy answers up to the first stop text; too long prompts lose their beginning.

        Raises:
            UserError: A request asks for something other than a greedy answer.
        """
        end = self.tokenizer.eos_token
        groups: dict[AnswerOptions, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(read_answer_options(request.args[1], end), []).append(index)
        answers = [""] * len(requests)
        for options, members in groups.items():
            limit = self.max_length - options.new_tokens
            if limit < 1:
                raise UserError(
                    f"max_gen_toks: {options.new_tokens}, but the longest text is {self.max_length}"
                )
            prompts = [self._encode_prompt(requests[index].args[0]) for index in members]
            self._note_cut([len(prompt) for prompt in prompts], limit)
            found = greedy(
                self.qm,
                [prompt[-limit:] for prompt in prompts],
                options.new_tokens,
                batch_size=self.batch_size,
                eos_ids={*end_ids(self.qm), self.tokenizer.eos_token_id} - {None},
                stop=functools.partial(self._stopped, options.stops),
            )
            for index, tokens in zip(members, found.tokens, strict=True):
                answers[index] = finish(self._decode, tokens, options.stops, self.think_end_token)
                request = requests[index]
                self.cache_hook.add_partial("generate_until", request.args, answers[index])
        return answers

    def _stopped(self, stops: tuple[str, ...], tokens: list[int]) -> bool:
        """Returns whether an answer contains a stop text, also as a special token."""
        if not stops:
            return False
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=False))
        return any(stop in text for stop in stops)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


KNOWN = tuple(
    name
    for name, parameter in inspect.signature(KVQuantLM.__init__).parameters.items()
    if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
)

if NAME not in model_registry:
    register_model(NAME)(KVQuantLM)


def main() -> int:
    """Runs lm-eval's command line with the model `kvquant`.

    Returns 0, or 2 for invalid input, which is reported in one line as by `kvquant`.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"kvquant: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # As a script this module is `__main__`, and its importable copy registers the model.
    sys.exit(main())
