"""The similarity of LongBench's code tasks, without the package that lm-eval takes it from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.evaluation.longbench_tasks import definition, metrics_module, score_answer, similarity
from kvquant.study.archive import read_archive

ROOT = Path(__file__).parents[2]
PUBLISHED = read_archive(ROOT / "results/published/h100")
RECORDS = [r for place, r in PUBLISHED.items() if place.endswith("longbench-lcc/seed0/run.json")]
SHORT = st.text(alphabet="ab (", max_size=12)


def matched(first: str, second: str) -> int:
    """Characters in the longest common piece, and in those to the left and to the right of it."""
    best = (0, 0, 0)
    for i in range(len(first)):
        for j in range(len(second)):
            size = 0
            while (
                first[i + size : i + size + 1] and first[i + size :][:1] == second[j + size :][:1]
            ):
                size += 1
            if size > best[0]:  # the first of the longest
                best = (size, i, j)
    size, i, j = best
    if not size:
        return 0
    left = matched(first[:i], second[:j])
    return left + size + matched(first[i + size :], second[j + size :])


@given(SHORT, SHORT)
def test_is_the_share_of_matched_characters(first: str, second: str) -> None:
    total = len(first) + len(second)
    share = 200 * matched(first, second) / total if total else 100
    assert similarity(first, second) == round(share)


def test_ends() -> None:
    assert similarity("", "") == similarity("x = 1", "x = 1") == 100
    assert similarity("", "x") == similarity("x", "") == similarity("abc", "xyz") == 0
    assert isinstance(similarity("ab", "ac"), int)


@pytest.mark.skipif(not RECORDS, reason="the published records are not here")
def test_published_scores_stay() -> None:
    task, seen = definition("lcc"), set()
    for record in RECORDS:
        for line in filter(None, record.samples.split("\n")):
            row = json.loads(line)
            found = score_answer(task, {"answers": row["references"]}, row["answer"])
            assert found == row["score"], (record.place, row["index"])
            seen.add(found)
    assert len(seen) > 20


def test_fuzzywuzzy_is_neither_imported_nor_needed() -> None:
    code = (
        "import sys; from kvquant.evaluation.longbench_tasks import definition, score_answer;"
        "print(score_answer(definition('lcc'), {'answers': ['x = 1']}, 'x = 2'));"
        "sys.exit(any(name.startswith('fuzzywuzzy') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (0, "0.8\n"), done.stderr
    assert metrics_module().fuzz.ratio is similarity
    for name in ("pyproject.toml", "requirements.lock"):
        assert not re.search("fuzzywuzzy|levenshtein", (ROOT / name).read_text().lower())
