"""Bad input: lengths beyond the model's positions, tokenizers without a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvquant.errors import UserError
from kvquant.evaluation.base import Context, check_length
from kvquant.models.generation import greedy
from kvquant.models.loading import load_quantized_model
from kvquant.study.schemes import Fp16Scheme, KiviScheme
from kvquant.study.tasks import LongBenchTask, PasskeyTask, RulerTask
from tests.evaluation.asking import asker, prepare
from tests.support.models import save_tiny
from tests.support.text import ESSAYS, TEXT

run_passkey = asker("long")
LONG = PasskeyTask(suite="passkey", length=420, samples=2, batch_size=2)


def load(folder: Path, rope: dict[str, Any] | None, positions: int = 256) -> Any:
    """The tiny model with other rotary settings in its config.json."""
    save_tiny(folder, positions=positions)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if rope is not None:
        theta = config.pop("rope_parameters", {}).get("rope_theta", 10000.0)
        config["rope_parameters"] = {"rope_theta": theta, **rope}
    file.write_text(json.dumps(config))
    scheme = KiviScheme(kind="kivi", bits=4, group=16, residual=16)
    return load_quantized_model(folder, scheme, device="cpu")


def context(qm: Any) -> Context:
    return Context(qm, "long", lambda part: ESSAYS)


def test_beyond_the_positions_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    qm = load(tmp_path, None)
    with pytest.raises(UserError, match=r"tasks\.long\.length: 420 .* 256 positions.*rope_scaling"):
        run_passkey(qm, LONG, 0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
    ],
)
def test_scaled_rope_lets_longer_prompts_pass(tmp_path: Path, rope: dict[str, Any]) -> None:
    qm = load(tmp_path, rope)
    assert (qm.max_positions, qm.position_limit) == (256, 512)
    found = run_passkey(qm, LONG, 0)
    assert all(400 < row["prompt_tokens"] <= 420 for row in found.rows)
    with pytest.raises(UserError, match="512 positions"):
        check_length(context(qm), 513, 0)
    with pytest.raises(UserError, match="512 positions"):
        greedy(qm, [[5] * 510], 3, batch_size=1)


def test_a_scaled_length_in_the_configuration_is_not_scaled_twice(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    qm = load(tmp_path, rope, positions=1024)
    assert (qm.max_positions, qm.position_limit) == (1024, 1024)


def test_no_chat_template_means_plain_prompts(tmp_path: Path) -> None:
    save_tiny(tmp_path, chat=False)
    qm = load_quantized_model(tmp_path, Fp16Scheme(kind="fp16"), device="cpu")
    assert not getattr(qm.tokenizer, "chat_template", None)
    spec = RulerTask(suite="ruler", task="niah_single_1", length=1600, samples=1)
    prompt = qm.tokenizer.decode(prepare(qm, "long", ESSAYS, spec, 0).prompts[0].tokens)
    assert "<|im_start|>user" not in prompt and prompt.rstrip().endswith(" is")
    row = {"context": TEXT, "input": "Which?", "answers": ["none"]}
    task = LongBenchTask(suite="longbench", task="qasper", length=900, max_new_tokens=3)
    lines = json.dumps(row)
    found = asker("lb", lines)(qm, task, 0)
    assert len(found.rows) == 1 and found.rows[0]["prompt_tokens"] > 50
