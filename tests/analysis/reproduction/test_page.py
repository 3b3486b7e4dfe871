"""The page of a reproduction: the outcome first, everything escaped, nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvquant.analysis.reproduction.page import page
from kvquant.analysis.reproduction.result import Reproduction
from kvquant.analysis.reproduction.rows import NOT_RUN, Row, Subject, exact, ratio
from tests.support.studies import study_of

WHERE: dict[str, Any] = {"published_device": "NVIDIA <H100>", "own_device": "processor (Linux)"}


def test_the_page() -> None:
    one = Subject("eval", "tiny", "nuq3", "ppl", 2, "calibrated again", **WHERE)
    two = Subject("energy", "tiny", "nuq3", "short", **WHERE)
    rows = [
        exact(one, "tokens", 1234, 1234),
        exact(one, "cache bytes", 10, 11),
        ratio(two, "energy over baseline", 0.5, 0.51, (0.5, 0.52)),
        Row(Subject("jobs", "", "", "one", 1), "", NOT_RUN, note="1 planned"),
    ]
    text = page(study_of(title="A <b>"), Reproduction(rows, 3, 1, 1, 0), Path("results/published"))
    assert "<h1>A &lt;b&gt;: measured again</h1>" in text and "NVIDIA &lt;H100&gt;" in text
    summary = text.index("2 quantities are reproduced, 1 differ")
    assert summary < text.index("<h2>Accuracy</h2>") < text.index("<h2>Energy</h2>")
    assert "Whole jobs</th><td>one</td>" in text and "1 planned" in text
    assert "calibrated again, not the published ones: nuq3" in text
    # what differs comes before what is reproduced
    assert text.index("cache bytes") < text.index("<td>tokens")
    assert "+2.0%<br><span class='ends'>(0 to +4.0%)" in text
    assert "script-src 'none'" in text and "<script" not in text
    assert not re.search(r"(src|href)=['\"]?https?:", text)
    assert "None" not in text and "nan" not in text
