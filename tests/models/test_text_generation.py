"""`kvquant.generate`: texts in, texts out, whatever their lengths and the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant
from kvquant.errors import OutlierOverflow, UserError
from kvquant.models import text_generation
from kvquant.models.generation import end_ids, greedy
from tests.support.models import save_tiny, tiny_model, tiny_tokenizer

SCHEME = {"kind": "kivi", "bits": 4, "group": 16, "residual": 16}
PROMPTS = ["The sky", "The grass is green. The sky is blue. " * 4, "One, two, three"]


@pytest.fixture(scope="module")
def qm(tmp_path_factory: pytest.TempPathFactory) -> kvquant.QuantizedModel:
    folder: Path = save_tiny(tmp_path_factory.mktemp("model"), positions=256)
    return kvquant.load(folder, SCHEME, device="cpu")


def alone(qm: kvquant.QuantizedModel, text: str, new: int, **options: Any) -> str:
    """What transformers' `generate` answers to one text over a cache of ours."""
    inputs = qm.tokenizer(text, return_tensors="pt")
    found = qm.model.generate(
        **inputs, past_key_values=qm.new_cache(), max_new_tokens=new, pad_token_id=0,
        **{"do_sample": False, **options},
    )  # fmt: skip
    answer = found[0, inputs.input_ids.shape[1] :]
    return str(qm.tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_answers_are_those_of_each_prompt_alone(
    qm: kvquant.QuantizedModel, batch_size: int
) -> None:
    expected = [alone(qm, text, 12) for text in PROMPTS]
    assert kvquant.generate(qm, iter(PROMPTS), 12, batch_size=batch_size) == expected
    assert len(set(expected)) == 3


def test_without_options_the_fast_path_answers(
    qm: kvquant.QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return greedy(*args, **kwargs)

    monkeypatch.setattr(text_generation, "greedy", watched)
    same = [
        kvquant.generate(qm, PROMPTS, 5, batch_tokens=64, **options)
        for options in ({}, {"do_sample": False}, {"temperature": None})
    ]
    assert seen == [{"batch_size": 16, "batch_tokens": 64}] * 3
    assert same[0] == same[1] == same[2]
    kvquant.generate(qm, PROMPTS, 5, num_beams=2)
    assert len(seen) == 3


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"repetition_penalty": 1.7}, {"eos_token_id": [5, 40]}]
)
def test_options_go_to_transformers(qm: kvquant.QuantizedModel, options: dict[str, Any]) -> None:
    found = kvquant.generate(qm, PROMPTS[:1], 12, **options)
    assert found == [alone(qm, PROMPTS[0], 12, **options)]


def test_a_batch_of_them_is_padded_on_the_left(qm: kvquant.QuantizedModel) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.7}
    expected = [alone(qm, text, 8, **options) for text in PROMPTS]
    assert kvquant.generate(qm, PROMPTS, 8, batch_size=2, **options) == expected


def test_a_temperature_means_sampling(qm: kvquant.QuantizedModel) -> None:
    def drawn(seed: int, **options: Any) -> list[str]:
        torch.manual_seed(seed)
        return kvquant.generate(qm, PROMPTS, 12, **options)

    hot = {"temperature": 3.0}
    assert drawn(1, **hot) == drawn(1, **hot) != drawn(2, **hot)
    assert drawn(1, **hot) == drawn(1, do_sample=True, **hot)
    assert drawn(1, top_k=1) == kvquant.generate(qm, PROMPTS, 12)


def test_no_sampling_means_greedy(qm: kvquant.QuantizedModel) -> None:
    """Also where options of sampling stand beside it, as in code that switches between both."""
    greedily = kvquant.generate(qm, PROMPTS, 12)
    hot: dict[str, Any] = {"do_sample": False, "temperature": 9.0, "top_p": 0.9}
    assert kvquant.generate(qm, PROMPTS, 12, **hot) == greedily
    beams = kvquant.generate(qm, PROMPTS, 12, num_beams=2)
    assert kvquant.generate(qm, PROMPTS, 12, num_beams=2, **hot) == beams


def test_no_new_tokens_are_an_empty_answer(qm: kvquant.QuantizedModel) -> None:
    none: dict[str, Any] = {}
    for options in (none, {"num_beams": 2}):
        assert kvquant.generate(qm, PROMPTS, 0, **options) == ["", "", ""]


def test_what_a_template_refuses_takes_one_line(qm: kvquant.QuantizedModel) -> None:
    template = qm.tokenizer.chat_template
    qm.tokenizer.chat_template = "{{ raise_exception('Roles\nmust alternate') }}"
    try:
        with pytest.raises(UserError, match=r"prompt 0: the chat template .*Roles must alternate"):
            kvquant.generate(qm, ["a"], chat=True)
    finally:
        qm.tokenizer.chat_template = template


def test_another_models_tokenizer_is_refused() -> None:
    other = kvquant.load(tiny_model(), SCHEME, tokenizer=tiny_tokenizer())
    with pytest.raises(UserError, match=r"tokenizer: gives the id .*, and the model has 97 tokens"):
        kvquant.generate(other, PROMPTS)


def test_stop_strings_end_an_answer(qm: kvquant.QuantizedModel) -> None:
    whole = kvquant.generate(qm, PROMPTS[:1], 12)[0]
    letters = [c for c in whole if c.isascii() and c.isalpha()]
    stop = letters[len(letters) // 2]
    cut = kvquant.generate(qm, PROMPTS[:1], 12, stop_strings=[stop])[0]
    assert stop in cut and whole.startswith(cut) and len(cut) < len(whole)


class Seen:
    """A streamer that keeps the tokens of prompts and answers."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ends: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends.append(len(self.parts))


def test_stop_strings_end_each_answer_of_a_model_without_an_end_token(
    qm: kvquant.QuantizedModel,
) -> None:
    expected = [kvquant.generate(qm, [text], 20, eos_token_id=[])[0] for text in PROMPTS]
    mark = expected[0][3]
    cut = [text[: text.find(mark) + 1] if mark in text else text for text in expected]
    assert cut != expected
    bare = kvquant.load(qm.model, SCHEME, tokenizer=tiny_tokenizer())
    bare.tokenizer.eos_token, before = None, bare.model.generation_config.eos_token_id
    bare.model.generation_config.eos_token_id = None
    try:
        assert kvquant.generate(bare, PROMPTS, 20, stop_strings=[mark]) == cut
    finally:
        bare.model.generation_config.eos_token_id = before


@pytest.mark.parametrize("none", [-1, [-1, 512]])
def test_an_end_token_that_no_model_gives_is_none(
    qm: kvquant.QuantizedModel, monkeypatch: pytest.MonkeyPatch, none: Any
) -> None:
    monkeypatch.setattr(qm.model.generation_config, "eos_token_id", none)
    assert end_ids(qm) == []
    assert len(kvquant.generate(qm, PROMPTS, 4)) == 3


@pytest.mark.parametrize("given", [None, "model"])
def test_only_what_load_returned_answers(given: Any) -> None:
    given = tiny_model() if given else None
    for call in (lambda: kvquant.generate(given, ["a"]), lambda: kvquant.unwrap(given)):
        with pytest.raises(UserError, match=r"qm: must be what kvquant.load returned, got "):
            call()


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}])
def test_a_streamer_gets_a_prompt_and_its_answer(
    qm: kvquant.QuantizedModel, options: dict[str, Any]
) -> None:
    seen = Seen()
    (answer,) = kvquant.generate(qm, PROMPTS[:1], 6, streamer=seen, **options)
    assert seen.parts[0] == qm.tokenizer(PROMPTS[0]).input_ids
    tokens = [token for part in seen.parts[1:] for token in part]
    assert qm.tokenizer.decode(tokens, skip_special_tokens=True) == answer
    assert seen.ends == [len(seen.parts)] and len(seen.parts) > 2
    with pytest.raises(UserError, match="streamer: shows one answer, and there are 3 prompts"):
        kvquant.generate(qm, PROMPTS, 6, streamer=seen, **options)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}])
def test_an_answer_that_is_tried_again_is_streamed_again(
    qm: kvquant.QuantizedModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = kvquant.generate(qm, PROMPTS[:1], 6, **options)
    forward, calls = qm.model.forward, []

    def lossy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise OutlierOverflow("no room")
        return forward(*args, **kwargs)

    seen = Seen()
    monkeypatch.setattr(qm.model, "forward", lossy)
    assert kvquant.generate(qm, PROMPTS[:1], 6, streamer=seen, **options) == expected
    first, last = seen.ends
    prompt = qm.tokenizer(PROMPTS[0]).input_ids
    assert seen.parts[0] == seen.parts[first] == prompt and last == len(seen.parts)
    assert seen.parts[1:first] == seen.parts[first + 1 :][: first - 1]


def test_chat_applies_the_template_to_turns(qm: kvquant.QuantizedModel) -> None:
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "The sky?"},
    ]
    text = qm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ask = "<|im_start|>\nThe sky<|im_end|>\n<|im_start|>assistant\n".replace(
        "<|im_start|>\n", "<|im_start|>user\n", 1
    )
    found = kvquant.generate(qm, [PROMPTS[0], turns], 8, chat=True)
    assert found == [alone(qm, ask, 8), alone(qm, text, 8)]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}])
def test_a_batch_out_of_memory_is_halved(
    qm: kvquant.QuantizedModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = kvquant.generate(qm, PROMPTS, 6, **options)
    forward, rows = qm.model.forward, []

    def small(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > 1:
            raise torch.cuda.OutOfMemoryError("no room")
        return forward(*args, **kwargs)

    monkeypatch.setattr(qm.model, "forward", small)
    assert kvquant.generate(qm, PROMPTS, 6, **options) == expected
    assert rows[:3] == [3, 2, 1]


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        ("The sky", {}, "prompts: is one text; give a list"),
        ({"a": "The sky"}, {}, "prompts: must be a list of texts, got dict"),
        (7, {}, "prompts: must be a list of texts, got int"),
        (["", "a"], {}, "prompt 0: is empty"),
        (["a", ""], {"num_beams": 2}, "prompt 1: is empty"),
        (["a " * 400], {}, "prompt 0: .* but the model has 256 positions"),
        (["a " * 400], {"num_beams": 2}, "prompt 0: .* but the model has 256 positions"),
        ([[1, 2]], {}, r"prompt 0: must be a text \(turns need chat=True\), got list"),
        ([[1, 2]], {"chat": True}, "prompt 0: must be a text or a list of turns, got list"),
        (["a"], {"max_length": 9}, "max_length: is no option of kvquant.generate; use max_new"),
        (["a"], {"num_return_sequences": 2}, "num_return_sequences: .* a prompt several times"),
        (["a"], {"top_pp": 0.7}, "options: transformers' generate refuses them .*top_pp"),
        (
            ["a"],
            {"temperature": -1.0},
            "options: transformers' generate refuses .*temperature",
        ),
        (["a"], {"pad_token_id": 3}, "pad_token_id: is no option .*; padding is hidden"),
        (["a"], {"eos_token_id": "x"}, "eos_token_id: must be a token id or a list of them"),
        (["a"], {"eos_token_id": -1}, r"eos_token_id: -1 holds a negative id; .* for none"),
        (["a"], {"num_beams": 0}, "num_beams: must be at least 1, got 0"),
        (["a"], {"num_beams": 2.5}, "num_beams: must be a whole number, got 2.5"),
        (["a"], {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: must be at least 0, got -1"),
        (["a"], {"min_new_tokens": "x"}, "min_new_tokens: must be a whole number, got 'x'"),
        (["a"], {"do_sample": "no"}, "do_sample: must be True or False, got 'no'"),
        (["a"], {"logits_processor": [5]}, "options: .* no use of logits_processor .*__call__"),
        (["a"], {"stop_strings": 5}, "options: .* no use of stop_strings .*not iterable"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1"),
        (["a"], {"batch_size": 1.5}, "batch_size: must be a whole number, got 1.5"),
        (["a"], {"batch_tokens": 0}, "batch_tokens: 0 leaves no room for a prompt"),
        (["a"], {"max_new_tokens": True}, "max_new_tokens: must be a whole number, got True"),
        (["a"], {"max_new_tokens": "8"}, "max_new_tokens: must be a whole number, got '8'"),
        (["a"], {"min_length": 9}, "min_length: is no option .*; use min_new_tokens"),
        (["a"], {"generation_config": {"top_k": 2}}, "generation_config: .* options by name"),
        (["a"], {"prefix_allowed_tokens_fn": print}, "prefix_allowed_tokens_fn: is no option"),
        (["a", "\ud800"], {}, "prompt 1: holds half of a surrogate pair"),
        (["\ud800"], {"chat": True}, "prompt 0: holds half of a surrogate pair"),
        ([[]], {"chat": True}, "prompt 0: has no turns"),
        ([[{"content": "a"}]], {"chat": True}, "prompt 0: turn 0 has no role, such as 'user'"),
        ([[{"role": "user"}]], {"chat": True}, "prompt 0: turn 0 has no content"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    qm: kvquant.QuantizedModel, prompts: Any, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as error:
        kvquant.generate(qm, prompts, **{"max_new_tokens": 8, **options})
    assert "\n" not in str(error.value)


def test_a_tokenizer_and_a_template_are_needed(qm: kvquant.QuantizedModel) -> None:
    bare = kvquant.load(qm.model, SCHEME)
    with pytest.raises(UserError, match=r"tokenizer: is missing; give kvquant.load a tokenizer"):
        kvquant.generate(bare, ["a"])
    template, qm.tokenizer.chat_template = qm.tokenizer.chat_template, None
    with pytest.raises(UserError, match="chat: the tokenizer has no chat template"):
        kvquant.generate(qm, ["a"], chat=True)
    qm.tokenizer.chat_template = template


@pytest.mark.parametrize("given", ["resources/models/mine", None, 3])
def test_a_model_that_was_not_loaded_here_is_refused_in_one_line(given: Any) -> None:
    for other in (given, tiny_model()):
        told = f"qm: must be what kvquant.load returned, got {type(other).__name__}"
        with pytest.raises(UserError, match=told):
            kvquant.generate(other, ["a"])
        with pytest.raises(UserError, match=told):
            kvquant.unwrap(other)


def test_no_prompts_have_no_answers(qm: kvquant.QuantizedModel) -> None:
    assert kvquant.generate(qm, []) == kvquant.generate(qm, [], num_beams=2) == []
