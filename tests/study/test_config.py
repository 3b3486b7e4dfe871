"""Study files: all shipped ones are valid, every kind of mistake is one clear line.

Also covers: study.schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kvquant.errors import UserError
from kvquant.study import digests
from kvquant.study.config import Study, load_study, parse_study
from kvquant.study.schema import schema_text

WHEEL = {"source": "pypi-gguf", "package": "name==1.0", "sha256": "0" * 64}


@pytest.fixture()
def raw(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "config/demo.yaml").read_text())


def test_shipped_studies_are_valid(root: Path) -> None:
    files = sorted((root / "config").glob("*.yaml"))
    assert {f.stem for f in files} >= {"config", "demo", "smoke", "quality", "ablation", "athena"}
    for file in files:
        assert isinstance(load_study(file), Study)


def test_schema_has_not_drifted(root: Path) -> None:
    assert (root / "config/schema.json").read_text() == schema_text(), "run `kvquant schema`"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 3}, r"seeds: Input should be a valid list \(got 3\)"),
        ({"seeds": [1, 1]}, "seeds: must be distinct"),
        ({"sedes": [1]}, "sedes: unknown key"),
        ({"baseline": "fp17"}, "baseline: 'fp17'"),
        ({"calibration": {"window": -5}}, "calibration.window"),
        ({"calibration": {"windw": 5}}, "calibration.windw: unknown key"),
        ({"tasks": {"p": {"suite": "perplexity", "window": -1}}}, r"tasks\.p\.window"),
        ({"tasks": {"p": {"suite": "perplexty"}}}, r"tasks\.p\.suite: unknown suite 'perplexty'"),
        ({"tasks": {"p": {"window": 512}}}, r"tasks\.p\.suite: missing"),
        ({"schemes": {"fp16": {"kind": "fp16"}, "x": {"kind": "nuk"}}}, "'nuk': did you mean nuq"),
        ({"models": {"m": {"source": "hub"}}}, "needs the field 'repo'"),
        ({"models": {"m": WHEEL | {"package": "-rx"}}}, r"models\.m\.package"),
        ({"models": {"m": WHEEL | {"package": "name>=1"}}}, r"models\.m\.package"),
        ({"models": {"m": WHEEL | {"sha256": "../x"}}}, r"models\.m\.sha256"),
        ({"evaluation": {"tasks": {"kivi-3": []}}}, r"evaluation\.tasks: 'kivi-3' is not among"),
        ({"evaluation": {"tasks": {"fp16": ["ppl-b"]}}}, "the baseline 'fp16' runs all tasks"),
        ({"evaluation": {"tasks": {"kivi-2": ["ppl-c"]}}}, "'ppl-c': did you mean ppl-b"),
    ],
)
def test_mistakes_name_their_field(
    raw: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_study({**raw, **change})


def test_unknown_names_offer_the_nearest(raw: dict[str, Any]) -> None:
    study = parse_study(raw)
    for call, name in ((study.scheme, "nuq3-1pc"), (study.task, "ppl"), (study.model, "smollm")):
        with pytest.raises(UserError, match="did you mean"):
            call(name)


def test_digests_change_only_with_what_they_depend_on(raw: dict[str, Any]) -> None:
    study = parse_study(raw)
    changed = {**raw, "schemes": {**raw["schemes"]}}
    changed["schemes"]["nuq3-1pct"] = {**raw["schemes"]["nuq3-1pct"], "sinks": 4}
    other = parse_study(changed)
    for scheme in study.schemes:
        same = digests.eval_digest(
            study, "smollm2-135m", scheme, "ppl-b", 0
        ) == digests.eval_digest(other, "smollm2-135m", scheme, "ppl-b", 0)
        assert same == (scheme != "nuq3-1pct")
    assert digests.calibration_digest(study, "smollm2-135m") == digests.calibration_digest(
        other, "smollm2-135m"
    )


def test_a_scheme_may_run_some_of_the_tasks(raw: dict[str, Any]) -> None:
    every = parse_study(raw).eval_cells()
    raw["evaluation"] = {"tasks": {"kivi-2": ["ppl-b"]}}
    cells = parse_study(raw).eval_cells()
    gone = {("kivi-2", task) for task in raw["tasks"] if task != "ppl-b"}
    assert gone and set(every) - set(cells) == gone and set(cells) < set(every)
