"""The figure of the energy of whole jobs: parts, shares, and the trials' range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvquant.analysis.figures import energy
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from tests.support.studies import study_of
from tests.support.tables import job_table

CASE: dict[str, Any] = {
    "shape": "7b-mha", "prompt": 16384, "answer": 512, "memory_gb": 40, "energy": True,
    "schemes": ["fp16", "nuq3"],
}  # fmt: skip
STUDY = study_of(jobs={"cases": {"one": CASE, "given": CASE | {"batch_size": 4}}})


def test_shares_are_of_all_joules() -> None:
    jobs = job_table(STUDY).iloc[:1]
    found = energy.shares(jobs).iloc[0]
    assert found.sum() == pytest.approx(1)
    row = jobs.iloc[0]
    prompts, answers = row.batch_size * row.prompt, row.batch_size * row.answer
    total = row.joules_per_prompt_token * prompts + row.joules_per_answer_token * answers
    seconds = prompts / row.prefill_tokens_per_s + answers / row.decode_tokens_per_s
    assert found["idle board"] == pytest.approx(120 * seconds / total)


def test_rows_have_parts_with_ranges_and_shares(tmp_path: Path) -> None:
    write_table(job_table(STUDY), tmp_path / "jobs.parquet")
    figure = energy.draw(STUDY, tmp_path)
    prompt, answer, share = figure.axes
    rows = [label.get_text() for label in prompt.get_yticklabels()]
    assert rows == [
        "16-bit cache, 2 at once", "NUQ 3 bits, 1 % outliers, 10 at once",
        "16-bit cache", "NUQ 3 bits, 1 % outliers",
    ]  # fmt: skip
    first = answer.containers[0]
    assert first.lines[0].get_xdata()[0] == pytest.approx(2.9)
    (bar,) = (line.get_segments()[0][:, 0] for line in first.lines[2])
    assert list(bar) == pytest.approx([0.99 * 2.9, 1.01 * 2.9])
    assert prompt.containers[0].lines[0].get_xdata()[0] == pytest.approx(26)  # per 1,000
    widths = [sum(bars[i].get_width() for bars in share.containers) for i in range(4)]
    assert widths == pytest.approx([100] * 4)


def test_estimates_are_not_drawn(tmp_path: Path) -> None:
    write_table(job_table(STUDY).assign(source="estimated"), tmp_path / "jobs.parquet")
    with pytest.raises(UserError, match="joules were counted"):
        energy.draw(STUDY, tmp_path)
