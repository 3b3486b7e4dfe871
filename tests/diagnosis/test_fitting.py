"""What fits by formula: what searches found on a GPU, monotony, one formula with the workflow's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.diagnosis.fitting import LIBRARIES, STEP, Room, fit, longest_prompt
from kvquant.diagnosis.model_facts import CacheFacts
from kvquant.study.asked_schemes import asked_scheme
from kvquant.study.jobs import CONTEXT_CHUNK
from kvquant.study.kernels import SHAPES
from kvquant.study.presets import PRESETS

GB = 10**9


def facts(shape: str, **other: Any) -> CacheFacts:
    """The facts of a shape of `SHAPES`, as long as the benchmark's models."""
    dims = SHAPES[shape]
    made: dict[str, Any] = {
        "windows": (None,) * dims["num_hidden_layers"],
        "heads": dims["num_attention_heads"],
        "kv_heads": dims["num_key_value_heads"],
        "head_dim": dims["hidden_size"] // dims["num_attention_heads"],
        "soft_cap": None,
        "static_rope": True,
        "kept_rope": False,
        "positions": 1 << 20,
        "hidden": dims["hidden_size"],
        "widest": dims["intermediate_size"],
        "eager": False,
    }
    return CacheFacts(**{**made, **other})


def searched(root: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Case, record and side of every published search of what fits in a limited memory."""
    file = root / "results/published/h100/jobs/h200.jsonl"
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        record = record.get("record", record)
        if record["emulated"]:
            found += [(record["case"], record, side) for side in record["sides"]]
    return found


def test_published_searches_found_what_the_formula_says(root: Path) -> None:
    """Within 15 %, as the screen says; the longest prompt was searched in steps of a call."""
    compared = 0
    for case, record, side in searched(root):
        room = Room(
            record["memory_bytes"], record["weight_bytes"], LIBRARIES, facts(record["shape"])
        )
        says = fit(asked_scheme(side["scheme"]), room, record["prompt"])
        assert says.tokens is not None and says.longest is not None
        if (tokens := side.get("capacity_tokens")) is not None:
            assert 0.85 * tokens <= says.tokens <= 1.05 * tokens, (case, side["scheme"])
            compared += 1
        if (longest := side.get("context_tokens")) is not None:
            most = longest + CONTEXT_CHUNK
            assert 0.85 * longest <= says.longest <= 1.05 * most, (case, side["scheme"])
            compared += 1
    assert compared >= 12


def test_bits_are_those_that_a_gpu_allocated(root: Path) -> None:
    """Of `nuq` at 16K, whose record has the bytes that torch allocated on a GPU."""
    room = Room(80 * GB, 0, 0, facts("7b-mha"))
    nuq = fit(asked_scheme("nuq3-1pct"), room, 16384)
    assert nuq.bits_per_element == pytest.approx(3.458, abs=0.002)
    assert fit(asked_scheme("fp16"), room, 16384).bits_per_element == 16.0
    assert fit(asked_scheme("allocated-3"), room, 16384).static_bytes == 32 * 132_560


@pytest.mark.parametrize("name", PRESETS)
def test_every_named_scheme_has_numbers_or_a_reason(name: str) -> None:
    room = Room(8 * GB, 0, 0, facts("tiny"))
    found = fit(asked_scheme(name), room, 1024, batch=2)
    if found.problem:
        assert "kvquant bench" in found.problem and "\n" not in found.problem
        assert asked_scheme(name).registration.caches is not None
        return
    assert found.tokens and found.prompts == found.tokens // 1024
    assert found.longest and found.longest_of_batch
    assert found.longest_of_batch <= found.longest
    assert found.bits_per_element and found.bits_per_element <= 16.0


def test_less_memory_longer_prompts_and_windows(root: Path) -> None:
    scheme = asked_scheme("nuq3-1pct")
    sizes = [fit(scheme, Room(n * GB, 4 * GB, GB, facts("7b-mha")), 8192) for n in (3, 8, 16)]
    tokens = [size.tokens or 0 for size in sizes]
    assert tokens[0] == 0 < tokens[1] < tokens[2]
    assert sizes[0].longest == 0
    windows = (1024, None) * 16
    hybrid = fit(scheme, Room(16 * GB, 4 * GB, GB, facts("7b-mha", windows=windows)), 8192)
    assert (hybrid.tokens or 0) > tokens[2]
    short = facts("7b-mha", positions=2000)
    assert fit(scheme, Room(16 * GB, 4 * GB, GB, short), 1024).longest == 2000


def test_a_scheme_that_does_not_serve_the_model_says_why() -> None:
    odd = facts("tiny", head_dim=20)
    found = fit(asked_scheme("nuq3-1pct"), Room(GB, 0, 0, odd), 1024)
    assert found.tokens is None and "head_dim: 20 is not a multiple of 8" in found.problem


def test_attention_that_holds_scores_takes_prompts_in_calls() -> None:
    eager = Room(80 * GB, 0, 0, facts("8b-gqa", eager=True))
    assert eager.call(65536) == CONTEXT_CHUNK and eager.call(100) == 100
    plain = Room(80 * GB, 0, 0, facts("8b-gqa"))
    scores = eager.activations(4096) - plain.activations(4096)
    assert scores == 32 * 4096**2 * 6


@given(rate=st.integers(1, 1000), budget=st.integers(0, 10**7), limit=st.integers(1, 10**6))
def test_the_longest_prompt_is_the_longest(rate: int, budget: int, limit: int) -> None:
    found = longest_prompt(lambda n: rate * n, budget, limit)
    assert rate * found <= budget and found <= limit
    assert found == limit or (found % STEP == 0 and rate * min(found + STEP, limit) > budget)
