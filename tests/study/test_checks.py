"""A study is checked whole before anything runs; every mistake is one line that names its field.

Also covers: study.datasets, study.datatypes, study.limits, study.margin, study.model_families,
study.models, study.registrations, study.schemes, study.sections, study.statistics, study.strict,
study.study_file, study.suite, study.task_families, study.tasks.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.study.config import load_study, parse_study
from kvquant.study.datasets import DATASETS
from kvquant.study.datatypes import DATATYPES
from kvquant.study.dotted import load
from kvquant.study.study_file import parse_mapping
from kvquant.study.tasks import LONGBENCH_TASKS
from tests.support.snakemakes import run_snakemake


@pytest.fixture(scope="module")
def raw(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "config/demo.yaml").read_text(encoding="utf-8"))


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The study with one value replaced; None as the last key's value removes it."""
    study = copy.deepcopy(raw)
    *folders, name = path.split("/")
    at = study
    for folder in folders:
        at = at.setdefault(folder, {})
    at[name] = value
    if value is None:
        del at[name]
    return study


MISTAKES = [
    ("headline", "nuq3-1pc", "headline: 'nuq3-1pc' is not among the schemes; did you mean nuq3"),
    ("baseline", "fp61", "baseline: 'fp61' is not among the schemes; did you mean fp16"),
    ("evaluation/schemes", ["fp16", "kivi-2"], ""),  # nuq3-1pct is timed
    ("evaluation/tasks", {"kivi-2": ["ppl-b"]}, "tasks_per_job: 'all' needs 'kivi-2' to run every"),
    ("evaluation/tasks_per_job", "two", "evaluation.tasks_per_job: Input should be 'one' or 'all'"),
    ("gpus", 1, "evaluation.tasks_per_job: 'all' is for studies on a CPU"),
    ("tasks/ppl-b/dataset", "wikitext", "tasks.ppl-b.dataset: unknown dataset 'wikitext': did you"),
    ("calibration/dataset", "essay", "calibration.dataset: unknown dataset 'essay': did you mean"),
    ("schemes/nuq3-1pct/datatype", "nuk", "datatype: unknown datatype 'nuk': did you mean nuq"),
    (
        "statistics/margins/perplexity",
        float("nan"),
        "perplexity.absolute: (inf|nan|Input)",
    ),
    (
        "statistics/margins/perplexity",
        float("inf"),
        "perplexity.absolute: (inf|nan|Input)",
    ),
    ("statistics/margins/perplexity", -0.5, "perplexity.absolute: (inf|nan|Input)"),
    ("statistics/margins/perplexity", 0, "perplexity.absolute: (inf|nan|Input)"),
    ("statistics/margins/perplexty", 1, "statistics.margins.perplexty.*perplexity"),
    ("statistics/margins/ruler", "5", "statistics.margins.ruler"),
    ("statistics/margins/ruler", True, "statistics.margins.ruler"),
    ("statistics/margins/ruler", None, "no margin for the suite 'ruler' of the task 'ruler-niah"),
    ("throughput/reps", 10**12, "throughput.reps: Input should be less than or equal to"),
    ("energy/reps", 10**12, "energy.reps: Input should be less than"),
    ("append/reps", 10**12, "append.reps: Input should be less than"),
    ("energy/trials", 10**12, "energy.trials: Input should be less than"),
    ("throughput/iterations", 10**12, "throughput.iterations: Input should be less than"),
    ("calibration/windows", 10**12, "calibration.windows: Input should be less than"),
    ("tasks/passkey-512/samples", 10**12, "tasks.passkey-512.samples: Input should be less than"),
    ("tasks/ppl-b/windows", 10**12, "tasks.ppl-b.windows: Input should be less than"),
    ("throughput/workloads/p1024-b1/batch_size", 10**9, "batch_size: Input should be less than"),
    ("statistics/bootstrap", 10**12, "statistics.bootstrap: Input should be less than"),
    ("append/sizes", [1, 10**12], "append.sizes: Value error|append: sizes: at most"),
    ("seeds", list(range(2000)), "seeds: List should have at most"),
    ("seeds", [0, 0], "seeds: must be distinct"),
    ("seeds", [0, -1], "seeds: must be distinct and not negative"),
    ("seeds", [0, 1.5], "seeds: 1.5 is no whole number"),
    ("seeds", [0, True], "seeds: true is not a number"),
    ("energy/trials", 2.0, "energy.trials: 2.0 is no whole number"),
    ("energy/trials", 1.5, "energy.trials: 1.5 is no whole number"),
    ("energy/trials", "3", "energy.trials: '3' is text"),
    ("energy/trials", True, "energy.trials: true is not a number"),
    ("energy/trials", "1e3", "energy.trials: '1e3' is text"),
    ("energy/seconds", "2", "energy.seconds: '2' is text"),
    ("energy/seconds", True, "energy.seconds: true is not a number"),
    ("protect", 1, "protect: 1 is a number"),
    ("protect", "yes", "protect: 'yes' is text"),
    ("schemes/nuq3-1pct/bits", True, "schemes.nuq3-1pct.bits: true is not a number"),
    ("schemes/nuq3-1pct/bits", 3.0, "schemes.nuq3-1pct.bits: 3.0 is no whole number"),
    ("tasks/passkey-512/length", 64, "tasks.passkey-512.length"),
    ("tasks/ruler-niah-single-1/length", 10, "tasks.ruler-niah-single-1.length"),
    ("tasks/ruler-niah-single-1/task", "vt2", "unknown ruler task 'vt2'"),
    ("tasks/vt", {"suite": "ruler", "task": "vt", "length": 300}, "tasks.vt.length: 'vt' needs at"),
    ("tasks/ruler-niah-single-1/max_new_tokens", 768, "max_new_tokens: leaves no room"),
    ("throughput/workloads/p1024-b1/schemes", ["nuq5"], "p1024-b1.schemes: 'nuq5' is not among"),
    ("throughput/schemes", ["nuq4-1pct"], "'nuq3-1pct' is not in throughput.schemes"),
    ("throughput/schemes", ["nuq4-1pct"] * 2, "throughput.schemes: 'nuq4-1pct' is given twice"),
    ("evaluation/schemes", ["fp16", "fp16"], "evaluation.schemes: 'fp16' is given twice"),
    ("append/schemes", ["nuq5"], "append.schemes: 'nuq5' is not among"),
    ("schemes/Nuq", {"kind": "fp8"}, "schemes: 'Nuq' must be kebab case"),
    ("schemes/a--b", {"kind": "fp8"}, "schemes: 'a--b' must be kebab case"),
    ("schemes/a-", {"kind": "fp8"}, "schemes: 'a-' must be kebab case"),
    ("schemes/a_b", {"kind": "fp8"}, "schemes: 'a_b' must be kebab case"),
    ("schemes/" + "a" * 99, {"kind": "fp8"}, "is longer than 64 characters"),
    ("schemes/concatenation", {"kind": "fp8"}, "schemes: 'concatenation' is taken"),
    ("models", {}, "models: must name at least one"),
    ("tasks", {}, "tasks: must name at least one"),
    ("calibration/outlier_fractions", [0.0, 0.01, 0.01], "outlier_fractions: must be distinct"),
    ("calibration/sinks", 512, "calibration.sinks: leaves no token"),
    ("calibrations", {"other": {}}, "calibrations.other: no scheme is built from it"),
    ("schemes/fp16/prompt_attention", "8-bit", "baseline: 'fp16' has prompt_attention 8-bit"),
    ("schemes/nuq3-1pct/prompt_attention", "4-bit", "schemes.nuq3-1pct.prompt_attention: Input"),
    ("schemes/nuq3-1pct/prompt_attention", 8, "schemes.nuq3-1pct.prompt_attention: "),
    ("schemes/fp16", {"kind": "hf-fp8"}, "the baseline 'fp16' cannot run its protocol B"),
]


@pytest.mark.fault(
    "statistics",
    "10^12 repetitions, NaN or negative margins, lossy numbers, unknown names",
    "refused by field",
)
@pytest.mark.parametrize(("path", "value", "message"), MISTAKES)
def test_every_mistake_names_its_field(
    raw: dict[str, Any], path: str, value: Any, message: str
) -> None:
    study = changed(raw, path, value)
    if not message:
        parse_study(study)
        return
    with pytest.raises(UserError, match=message) as found:
        parse_study(study)
    assert all(line.startswith("config: ") for line in str(found.value).splitlines())
    assert len(str(found.value)) < 1000


def test_a_headline_that_nobody_measures(raw: dict[str, Any]) -> None:
    study = changed(raw, "evaluation/schemes", ["fp16", "kivi-2"])
    study["throughput"]["schemes"] = ["kivi-2"]
    study["throughput"]["workloads"] = {}
    with pytest.raises(UserError, match="headline: 'nuq3-1pct' is neither evaluated nor timed"):
        parse_study(study)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"window": 64}, "window: calls of 64"),
        ({"protocol": "A", "window": 512, "chunk": 127}, "chunk: calls of 127"),
        ({"protocol": "A", "window": 0, "chunk": 100}, "chunk: calls of 100"),
        ({"protocol": "A", "window": 100, "chunk": 256}, "window: calls of 100"),
        ({"window": 128}, None),
        ({"window": 0}, None),
        ({"protocol": "A", "window": 512}, None),
    ],
)
def test_calls_that_are_too_short_for_8_bit_attention(
    raw: dict[str, Any], options: dict[str, Any], option: str | None
) -> None:
    """A record would say 8 bits of what was measured in 16."""
    study = changed(raw, "schemes/eight", {"kind": "fp8", "prompt_attention": "8-bit"})
    study["evaluation"] = {}
    study["tasks"]["ppl-b"] |= options
    if option is None:
        parse_study(study)
        return
    with pytest.raises(UserError, match=rf"tasks.ppl-b.{option} tokens attend in 16 bits"):
        parse_study(study)
    others = [name for name in study["tasks"] if name != "ppl-b"]
    parse_study(changed(study, "evaluation/tasks", {"eight": others}))


def test_impossible_protocols(raw: dict[str, Any]) -> None:
    study = changed(raw, "schemes/quanto", {"kind": "hf-quanto", "bits": 4})
    study["evaluation"] = {"tasks": {"quanto": ["ppl-b"]}}
    with pytest.raises(UserError, match=r"evaluation.tasks.quanto: protocol B of 'ppl-b'"):
        parse_study(study)
    study["tasks"] = {"ppl-b": study["tasks"]["ppl-b"]}
    study["evaluation"] = {"schemes": ["fp16", "nuq3-1pct", "quanto"]}
    with pytest.raises(UserError, match="'quanto' cannot run the protocol of any task"):
        parse_study(study)


@pytest.mark.fault(
    "statistics",
    "900 models, 1000 seeds, 1000 repetitions",
    "counted, not listed; refused",
)
def test_many_of_everything_are_counted_not_listed(raw: dict[str, Any]) -> None:
    study = changed(raw, "throughput/reps", 1000)
    study["seeds"] = list(range(1000))
    study["models"] = {f"m{i}": raw["models"]["smollm2-135m"] for i in range(900)}
    with pytest.raises(UserError, match="results; a study has at most"):
        parse_study(study)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
FILES = {
    "deep flow": (b"[" * 50_000, "nested deeper than"),
    "deep block": (b"\n".join(b" " * i + b"a:" for i in range(500)), "nested deeper than"),
    "alias bomb": (BOMB.encode(), "aliases written out"),
    "cycle": (b"a: &a [*a]", "refers to itself"),
    "double key": (b"study: a\nseeds: [1]\nstudy: b\n", "line 3: key 'study' is given twice"),
    "tab": (b"study: a\n\tseeds: [1]\n", "line 2: .*character"),
    "not UTF-8": (b"study: \xff\xfe", "is not UTF-8"),
    "binary": (bytes(range(256)), "is not UTF-8"),
    "control": (b"study: \x07", "not valid YAML"),
    "huge": (b"x: " + b"y" * 600_000, "characters; a study has at most"),
    "empty": (b"", "expected a mapping"),
    "list": (b"- a\n- b\n", "expected a mapping"),
    "text": (b"hello", "expected a mapping"),
    "unclosed": (b"a: [1, 2", "not valid YAML"),
    "tag": (b"a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    "list as key": (b"? [a, b]\n: 1\n", "not valid YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", "not valid YAML"),
    "bad date": (b"a: 2001-99-99\n", "not valid YAML"),
    "base 8": (b"study: a\nseeds: [010]\n", "line 2: '010' is a number of base 8 or 60"),
    "base 60": (b"study: a\nseeds: [1:10]\n", "line 2: '1:10' is a number of base 8 or 60"),
    "half a pair": (b'study: "\\uD800"\n', "line 1: half of a surrogate pair"),
    "number": (b"study: a\nseeds: .nan\n", "seeds"),
}


@pytest.mark.fault(
    "statistics",
    "a study with an alias bomb, a cycle, 50,000 brackets, a key twice, a tab, bytes that "
    "are not UTF-8, numbers that YAML takes for base 8 or 60",
    "one line",
)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = FILES[name]
    file = tmp_path / "study.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as found:
        load_study(file)
    assert name == "number" or "\n" not in str(found.value)
    assert main(["grid", "--study", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_numbers_in_quotes_are_text() -> None:
    assert parse_mapping('{a: "010", b: "1:10", c: 0, d: 10, e: 0.5, f: 0x10}', "study") == {
        "a": "010", "b": "1:10", "c": 0, "d": 10, "e": 0.5, "f": 16,
    }  # fmt: skip


@pytest.mark.fault(
    "statistics",
    "any bytes as a study",
    "accepted or one line",
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "ignore")))
def test_any_bytes_are_a_study_or_a_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError):
        load_study(file)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_field_is_taken_or_told(raw: dict[str, Any], data: st.DataObject) -> None:
    """One field of the demo becomes anything that YAML can hold."""
    study = copy.deepcopy(raw)
    at: Any = study
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    at[key] = data.draw(
        scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(), scalars)
    )
    try:
        parse_study(study)
    except UserError as error:
        assert str(error)


def test_lists_of_names_are_the_registries(raw: dict[str, Any]) -> None:
    for name in DATATYPES:
        assert parse_study(changed(raw, "schemes/nuq3-1pct/datatype", name))
    texts = ("essays", "wikitext2", "squad", "hotpotqa")
    assert {*texts, *(f"longbench-{name}" for name in LONGBENCH_TASKS)} == set(DATASETS)
    assert all(callable(load(dataset.fetch)) for dataset in DATASETS.values())


def test_snakemake_refuses_a_key_that_stands_twice(root: Path, tmp_path: Path) -> None:
    """Snakemake itself would take the last."""
    file = tmp_path / "study.yaml"
    demo = (root / "config/demo.yaml").read_bytes()
    file.write_bytes(demo + b"study: again\n")
    words = ["-n", "--nolock", "--replace-workflow-config", "--configfile", str(file)]
    done = run_snakemake(words, root)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout, done.stderr[-2000:]
    assert "key 'study' is given twice" in done.stdout + done.stderr
