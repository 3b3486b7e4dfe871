"""The lm-eval model: its scores are the model's, and its command line runs an offline task.

Also covers: evaluation.likelihood, evaluation.lm_eval_options.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from tests.support.forks import as_module, forked

lm = pytest.importorskip("kvquant.evaluation.lm_eval_model", reason="lm-eval is not installed")
PROMPTS = ["The grass is green.", "The sky is blue. Here we go.", "The sun is", "There and back"]

LONG = [" ".join(PROMPTS[:n] * 6) for n in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> Any:
    return lm.KVQuantLM(str(tiny_dir), scheme="fp16", device="cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study with a scheme that fits heads of 16 elements."""
    kivi = {"kind": "kivi", "bits": 2, "group": 16, "residual": 16}
    raw = {
        "study": "check",
        "models": {"tiny": {"source": "local", "path": "x"}},
        "schemes": {"fp16": {"kind": "fp16"}, "kivi-2": kivi},
        "headline": "kivi-2",
        "tasks": {"passkey": {"suite": "passkey"}},
    }
    file = tmp_path_factory.mktemp("study") / "study.json"
    file.write_text(json.dumps(raw))
    return str(file)


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_is_registered() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("kvquant") is lm.KVQuantLM


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_scores_are_those_of_a_plain_forward(tiny_dir: Path, tiny: Any, protocol: Any) -> None:
    model = lm.KVQuantLM(str(tiny_dir), scheme="fp16", protocol=protocol, device="cpu")
    context, target = PROMPTS[1], " The sun is yellow."
    [(score, is_greedy)] = model.loglikelihood([ask(context, target)], disable_tqdm=True)
    before, both = (tiny.tokenizer(text).input_ids for text in (context, context + target))
    with torch.inference_mode():
        logits = tiny.model(torch.tensor([both])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(both) - 1)
    expected = sum(float(logits[at, both[at + 1]]) for at in places)
    assert score == pytest.approx(expected, rel=0.01) and not is_greedy


def test_greedy_continuation_is_known_as_such(model: Any) -> None:
    tokens = model.tok_encode(PROMPTS[0])
    found = lm.greedy(model.qm, [tokens], 4, batch_size=1).tokens[0]
    assert model._score(tokens, found)[1]
    assert not model._score(tokens, [(found[0] + 1) % 512, *found[1:]])[1]


def test_a_quantized_cache_is_what_is_scored(tiny_dir: Path, model: Any, study: str) -> None:
    request = [ask(" ".join(PROMPTS * 8), " The sun is yellow.")]
    packed = lm.KVQuantLM(str(tiny_dir), scheme="kivi-2", study=study, device="cpu")
    assert packed.loglikelihood(request, disable_tqdm=True) != model.loglikelihood(
        request, disable_tqdm=True
    )
    assert packed.loglikelihood(request, disable_tqdm=True) == packed.loglikelihood(
        request, disable_tqdm=True
    )


def test_8_bit_attention_is_what_is_scored(tiny_dir: Path, model: Any) -> None:
    """Of a long prompt; a short one is scored as without the option."""
    eight = lm.KVQuantLM(str(tiny_dir), scheme="fp16", prompt_attention="8-bit", device="cpu")
    for text, same in ((" ".join(PROMPTS * 12), False), (PROMPTS[1], True)):
        request = [ask(text, " The sun is yellow.")]
        [(found, _)] = eight.loglikelihood(request, disable_tqdm=True)
        [(plain, _)] = model.loglikelihood(request, disable_tqdm=True)
        assert (found == plain) is same and found == pytest.approx(plain, rel=0.05)
    with pytest.raises(UserError, match="prompt_attention: '8' is neither"):
        lm.KVQuantLM(str(tiny_dir), scheme="fp16", prompt_attention="8", device="cpu")


def test_rolling_counts_every_token_once(model: Any) -> None:
    text = " ".join(PROMPTS)
    [whole] = model.loglikelihood_rolling([ask(text)])
    tokens = model.tok_encode(text)
    assert whole == pytest.approx(model._score([model.prefix_token_id], tokens)[0], rel=1e-4)


def test_answers_do_not_depend_on_the_batch(tiny_dir: Path, study: str) -> None:
    requests = [ask(p, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for p in LONG]
    found = []
    for size in (1, 3, 4):
        model = lm.KVQuantLM(str(tiny_dir), "kivi-2", study=study, batch_size=size, device="cpu")
        found.append(model.generate_until(requests))
    assert found[0] == found[1] == found[2]
    assert all("\n" not in text for text in found[0]) and any(found[0])


def test_bad_input_is_named(tiny_dir: Path, tmp_path: Path, model: Any) -> None:
    with pytest.raises(UserError, match="is unknown: give study=FILE or quantizer=FILE"):
        lm.KVQuantLM(str(tiny_dir), scheme="nuq3-1pct", device="cpu")
    with pytest.raises(UserError, match="no such file"):
        lm.KVQuantLM(str(tiny_dir), scheme="nuq3-1pct", quantizer=str(tmp_path / "q.json"))
    with pytest.raises(UserError, match="greedy"):
        model.generate_until([ask("a", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(UserError, match="max_gen_toks"):
        model.generate_until([ask("a", {"max_gen_toks": 4000})])


def test_command_line_runs_an_offline_task(
    tiny_dir: Path, tmp_path: Path, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks

    class OwnTasks(tasks.TaskManager):  # the library's 13,000 files take most of the time to read
        def __init__(self, **options: Any) -> None:
            super().__init__(include_defaults=False, **options)

    monkeypatch.setattr(tasks, "TaskManager", OwnTasks)
    rows = [{"q": p, "choices": [" green", " yellow"], "gold": 0} for p in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny_choice.yaml").write_text(json.dumps(task))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    words = f"""-m kvquant.evaluation.lm_eval_model --model kvquant
        --model_args pretrained={tiny_dir},scheme=kivi-2,study={study} --device cpu --batch_size 2
        --tasks tiny_choice --include_path {tmp_path} --output_path {tmp_path / "out"}"""
    status, said = forked(as_module([sys.executable, *words.split()], os.environ | environment))
    assert status == 0, said[-2000:]
    assert "tiny_choice" in said
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(file.read_text())["results"]["tiny_choice"]["acc,none"] <= 1
