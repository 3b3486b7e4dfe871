"""The lm-eval model against lm-eval's own `hf`, on a tiny model with the unquantized cache."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvquant.errors import NonFinite, UserError
from tests.support.models import adding, save_tiny, tiny_tokenizer

lm = pytest.importorskip("kvquant.evaluation.lm_eval_model", reason="lm-eval is not installed")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

POSITIONS = 96
TOLERANCE = 3e-3  # relative: the unquantized cache holds 16 bits, hf computes in 32
TEXTS = [
    "The sky is blue.",
    "The grass is green. The sun is yellow. Here we go. " * 3,
    "There is an important info hidden inside a lot of irrelevant text. " * 12,
]
PAIRS = [
    ("The sky is", " blue."),
    ("The sky is ", "green"),
    ("", "The sun is yellow."),
    (TEXTS[2], " Remember it."),
    ("What are they?\nA", "\n\nB"),
]


@pytest.fixture(scope="module", params=["plain", "adds BOS"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose tokenizer adds no special token, or BOS."""
    from tokenizers.processors import TemplateProcessing

    where = save_tiny(tmp_path_factory.mktemp("hf"), positions=POSITIONS)
    if request.param == "adds BOS":
        tokenizer = tiny_tokenizer()
        bos, number = tokenizer.bos_token, tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
        )
        tokenizer.save_pretrained(where)
    return where


def ours(folder: Path, **options: Any) -> Any:
    return lm.KVQuantLM(str(folder), scheme="fp16", device="cpu", **options)


def theirs(folder: Path, **options: Any) -> Any:
    return huggingface.HFLM(
        str(folder), device="cpu", dtype="float32", batch_size=1, max_length=POSITIONS, **options
    )


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args, task_name="t")


def scores(model: Any, **options: Any) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(
        [ask(*pair) for pair in PAIRS], disable_tqdm=True
    )
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_bos_token": False},
        {"add_bos_token": True},
        {"prefix_token_id": 7},
        {"logits_cache": False, "softmax_dtype": "float64"},
    ],
    ids=str,
)
def test_log_likelihoods(folder: Path, options: dict[str, Any]) -> None:
    found, expected = scores(ours(folder, **options)), scores(theirs(folder, **options))
    for mine, right in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(right[0], rel=TOLERANCE) and mine[1] == right[1]


def test_a_continuation_that_greedy_decoding_gives_is_known(folder: Path) -> None:
    model, other = ours(folder), theirs(folder)
    [answer] = model.generate_until([ask("The sky is", {"until": [], "max_gen_toks": 2})])
    pair = [ask("The sky is", answer)]
    assert model.loglikelihood(pair, True)[0][1] == other.loglikelihood(pair, True)[0][1]


@pytest.mark.parametrize("options", [{}, {"prefix_token_id": 7}], ids=str)
def test_rolling_predicts_each_token_of_the_text_once(
    folder: Path, options: dict[str, Any]
) -> None:
    requests = [ask(text) for text in TEXTS]
    found = ours(folder, **options).loglikelihood_rolling(requests, disable_tqdm=True)
    # hf's default predicts BOS from BOS, where the tokenizer adds it.
    expected = theirs(folder, add_bos_token=False, **options).loglikelihood_rolling(
        requests, disable_tqdm=True
    )
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_a_text_that_brings_its_bos_gets_no_second(folder: Path) -> None:
    model = ours(folder)
    bos = model.tokenizer.bos_token
    plain, marked = model.loglikelihood_rolling([ask("The sky"), ask(bos + "The sky")])
    assert plain == marked


def test_an_end_token_behind_texts_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """Scores and answers are those of a tokenizer that adds none."""
    from transformers import AutoTokenizer

    plain = ours(folder)
    bos = plain.tokenizer("").input_ids
    begin = f"{plain.tokenizer.bos_token} $A" if bos else "$A"
    adding(f"{begin} {plain.tokenizer.eos_token}").save_pretrained(tmp_path)
    end = AutoTokenizer.from_pretrained(tmp_path)("a").input_ids[-1]
    assert end == plain.tokenizer.eos_token_id
    ended = ours(folder, tokenizer=str(tmp_path))
    pairs = [ask(*pair) for pair in PAIRS]
    assert ended.loglikelihood(pairs) == plain.loglikelihood(pairs)
    texts = [ask(text) for text in TEXTS]
    assert ended.loglikelihood_rolling(texts) == plain.loglikelihood_rolling(texts)
    asked = [ask(text, {"until": [], "max_gen_toks": 8}) for text in TEXTS]
    assert ended.generate_until(asked) == plain.generate_until(asked)


GREEDY: list[dict[str, Any]] = [
    {"until": ["\n\n"], "max_gen_toks": 9},
    {"until": "e", "max_new_tokens": 12},
    {"until": ["zz", " ", "is"], "max_tokens": 20, "do_sample": False, "temperature": 0.7},
    {"max_completion_tokens": 7, "temperature": 0.0, "top_p": 0.9},
    {"until": ["<|end|>"], "max_gen_toks": 30, "max_new_tokens": 3},
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", GREEDY, ids=str)
@pytest.mark.parametrize("model_options", [{}, {"add_bos_token": False}], ids=str)
def test_answers(folder: Path, options: dict[str, Any], model_options: dict[str, Any]) -> None:
    prompts = [*TEXTS, "<|im_start|>Who?", "The sun"]
    given = copy.deepcopy(options)
    found = ours(folder, **model_options).generate_until([ask(p, given) for p in prompts])
    expected = theirs(folder, **model_options).generate_until(
        [ask(p, copy.deepcopy(options)) for p in prompts], disable_tqdm=True
    )
    assert found == expected and any(found)
    assert given == options


def test_answers_that_are_cut_by_the_tokenizer(folder: Path) -> None:
    models = [make(folder, truncation=True) for make in (ours, theirs)]
    for model in models:
        model.tokenizer.model_max_length = 12
    requests = [ask(TEXTS[2], {"until": [], "max_gen_toks": 6})]
    assert models[0].generate_until(requests) == models[1].generate_until(requests, True)


@pytest.mark.parametrize("batch_size", [1, 2, 5, "auto", "auto:4"])
def test_answers_stop_at_a_special_token(folder: Path, batch_size: Any) -> None:
    """A stop text that is a special token ends an answer and is no part of it, in any batch."""
    model, other = ours(folder, batch_size=batch_size), theirs(folder)
    free = [ask(text, {"until": [], "max_gen_toks": 12}) for text in TEXTS[:2]]
    tokens = model.tokenizer(model.generate_until(free)[0], add_special_tokens=False).input_ids
    # A token that the model writes becomes special.
    word = model.tokenizer.convert_ids_to_tokens(tokens[4])
    for one in (model, other):
        one.tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    stop = model.tokenizer.decode([tokens[4]], skip_special_tokens=False)
    assert model.tokenizer.decode([tokens[4]], skip_special_tokens=True) == ""
    asked = [ask(text, {"until": [stop], "max_gen_toks": 12}) for text in TEXTS[:2]]
    found = model.generate_until(asked)
    assert found == other.generate_until(asked, disable_tqdm=True)
    assert len(found[0]) < len(model.generate_until(free)[0])


@pytest.mark.parametrize("mark", ["is", 300, "300"])
def test_what_stands_before_the_end_of_a_thought_is_left_out(folder: Path, mark: Any) -> None:
    requests = [ask(text, {"until": [], "max_gen_toks": 40}) for text in TEXTS]
    plain = ours(folder).generate_until(requests)
    tokens = ours(folder).tokenizer(plain[0], add_special_tokens=False).input_ids
    mark = mark if mark == "is" else type(mark)(tokens[0])
    found = ours(folder, think_end_token=mark).generate_until(requests)
    assert found == theirs(folder, think_end_token=mark).generate_until(requests, True)
    assert mark == "is" or found[0] != plain[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"enable_thinking": False}, {"chat_template_args": {"tone": "kind"}}],
    ids=str,
)
@pytest.mark.parametrize("opened", [True, False])
def test_chat_templates(folder: Path, options: dict[str, Any], opened: bool) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ tone }}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ enable_thinking }}{% endif %}"
    )
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Who?"}]
    found = []
    for make in (ours, theirs):
        model = make(folder, **copy.deepcopy(options))
        model.tokenizer.chat_template = template
        found.append(model.apply_chat_template(copy.deepcopy(turns), opened))
        found.append(model.chat_template(True))
        assert model.chat_template(False) is None
    assert found[:2] == found[2:]


def test_a_template_writes_a_fixed_day(folder: Path) -> None:
    model = ours(folder, chat_template_args={"date_string": "3 Feb 2025"})
    model.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert model.apply_chat_template([{"role": "user", "content": "Hi"}]) == "03 Feb 2025 Hi"


@pytest.mark.fault(
    "evaluation",
    "unknown options of the lm-eval model",
    "refused by name",
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "unknown model option 'load_in_8bit'"),
        ({"enable_thinkng": False}, "did you mean enable_thinking"),
        ({"peft": "x"}, "peft: the model kvquant has no such option"),
        ({"parallelize": True}, "parallelize"),
        ({"revision": "v2"}, "revision"),
        ({"enable_thinking": True}, "enable_thinking: set think_end_token"),
        ({"max_length": 4 * POSITIONS}, f"max_length: {4 * POSITIONS}, but .* {POSITIONS}"),
        ({"max_length": 0}, "max_length"),
        ({"batch_size": "many"}, "batch_size: must be a positive number or auto"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "auto:x"}, "batch_size"),
        ({"dtype": "int8"}, "dtype: must be float32"),
        ({"dtype": "nonsense"}, "dtype: must be float32"),
        ({"chat_template_args": "x"}, "chat_template_args: must be a JSON object"),
        ({"chat_template_args": [1]}, "chat_template_args: must be a mapping"),
    ],
    ids=str,
)
def test_options_are_refused_by_name(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours(folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.8}, "greedy"),
        ({"do_sample": True}, "greedy"),
        ({"do_sample": True, "temperature": 0.0}, "greedy"),
        ({"num_beams": 4}, "gen_kwargs: 'num_beams'"),
        ({"repetition_penalty": 1.3}, "gen_kwargs: 'repetition_penalty'"),
        ({"max_length": 20}, "max_length: includes the prompt"),
        ({"max_gen_toks": 0}, "max_gen_toks: must be at least 1"),
        ({"max_new_tokens": "many"}, "gen_kwargs"),
        ({"max_tokens": 5000}, "max_gen_toks: 5000"),
        ({"until": [3]}, "until"),
    ],
    ids=str,
)
def test_generation_options_are_refused_by_name(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ours(folder).generate_until([ask("The sky", {"until": ["\n"], **options})])


def test_nothing_to_score_is_refused(folder: Path) -> None:
    model = ours(folder)
    with pytest.raises(UserError, match="a continuation is empty"):
        model.loglikelihood([ask("The sky", "")], disable_tqdm=True)
    with pytest.raises(UserError, match="max_length: 96, but a continuation alone"):
        model.loglikelihood([ask("The", TEXTS[2])], disable_tqdm=True)
    thinks = ours(folder, enable_thinking=True, think_end_token="</think>")
    with pytest.raises(UserError, match="enable_thinking: is for tasks with generated answers"):
        scores(thinks)


@pytest.mark.fault(
    "evaluation",
    "a tokenizer without BOS and EOS",
    "asks for prefix_token_id",
)
def test_without_bos_and_eos_a_prefix_must_be_given(folder: Path) -> None:
    model = ours(folder)
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"prefix_token_id: .* no BOS or EOS"):
        model.loglikelihood_rolling([ask("The sky")])
    given = ours(folder, prefix_token_id=7)
    given.tokenizer.bos_token = given.tokenizer.eos_token = None
    assert given.loglikelihood_rolling([ask("The sky")])[0] < 0


def test_prompts_reach_the_scaled_positions_and_say_when_they_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    folder = save_tiny(tmp_path / "scaled", positions=POSITIONS)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    model = ours(folder)
    assert model.max_length == 4 * POSITIONS
    request = [ask(TEXTS[2], {"until": [], "max_gen_toks": 4})]
    model.generate_until(request)
    assert "keep their last" not in capsys.readouterr().err
    ours(folder, max_length=POSITIONS).generate_until(request)
    assert "keep their last 92 (max_length 96)" in capsys.readouterr().err


@pytest.mark.fault(
    "evaluation",
    "NaN logits while lm-eval scores",
    "stops by name",
)
def test_nan_logits_are_refused(folder: Path) -> None:
    model = ours(folder)
    with torch.no_grad():
        model.qm.model.lm_head.weight[5] = float("nan")
    for call in (scores, lambda m: m.loglikelihood_rolling([ask(TEXTS[0])])):
        with pytest.raises(NonFinite, match="scheme fp16: logits of token 0 of a continuation"):
            call(model)
    with pytest.raises(NonFinite, match="step 0 of an answer"):
        model.generate_until([ask("The sky", {"until": [], "max_gen_toks": 3})])


@pytest.mark.fault(
    "evaluation",
    "another release of lm-eval",
    "refused",
)
def test_another_lm_eval_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvquant.fetch.lm_eval_files.version", lambda name: "0.5.0")
    with pytest.raises(UserError, match=r"lm-eval: version 0\.5\.0 is installed, 0\.4\.13"):
        ours(folder)
