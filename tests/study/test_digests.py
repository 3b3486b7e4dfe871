"""Digests: a result depends on what it was made of, and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvquant.errors import UserError
from kvquant.study import digests
from kvquant.study.config import Study, load_study, parse_study

MODEL = "smollm2-135m"


@pytest.fixture()
def raw(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "config/demo.yaml").read_text())


def every_digest(study: Study) -> dict[str, str]:
    """Every digest of a study."""
    found = {"calibrate": digests.calibration_digest(study, MODEL)}
    for scheme in study.schemes:
        found[f"quantize/{scheme}"] = digests.quantizer_digest(study, MODEL, scheme)
        for task in study.tasks:
            for seed in study.seeds:
                key = f"eval/{scheme}/{task}/{seed}"
                found[key] = digests.eval_digest(study, MODEL, scheme, task, seed)
    for scheme, workload, _ in study.throughput_cells():
        found[f"perf/{scheme}/{workload}"] = digests.perf_digest(study, MODEL, scheme, workload)
    found["append"] = digests.append_digest(study)
    for scheme, workload, _ in study.energy_cells():
        found[f"energy/{scheme}/{workload}"] = digests.energy_digest(study, MODEL, scheme, workload)
    return found


def changed(raw: dict[str, Any], *keys: str, value: Any) -> set[str]:
    """The digests that another value of one key changes."""
    before = every_digest(parse_study(raw))
    other = yaml.safe_load(yaml.safe_dump(raw))
    at = other
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    after = every_digest(parse_study(other))
    return {name for name in before if name in after and before[name] != after[name]}


def test_all_results_of_a_study_differ(raw: dict[str, Any]) -> None:
    found = every_digest(parse_study(raw))
    assert len(set(found.values())) == len(found)


def test_a_task_changes_its_own_results(raw: dict[str, Any]) -> None:
    found = changed(raw, "tasks", "passkey-512", "length", value=256)
    assert found
    assert all(name.startswith("eval/") and "/passkey-512/" in name for name in found)


def test_calibration_changes_calibrated_schemes_only(raw: dict[str, Any]) -> None:
    found = changed(raw, "calibration", "window", value=256)
    assert "calibrate" in found
    schemes = {name.split("/")[1] for name in found if "/" in name}
    assert schemes == {s for s in raw["schemes"] if s.startswith("nuq")}


def test_a_scheme_may_have_a_calibration_of_its_own(raw: dict[str, Any]) -> None:
    """It changes this scheme's results alone; the same calibration under a name is another."""
    before = parse_study(raw)
    name = next(n for n, s in before.schemes.items() if s.registration.calibrated)
    raw["calibrations"] = {"other": before.calibration.model_dump() | {"seed": 7}}
    raw["schemes"][name] = {**raw["schemes"][name], "calibration": "other"}
    after = parse_study(raw)
    assert after.used_calibrations() != [None]
    assert digests.calibration_digest(after, MODEL) == digests.calibration_digest(before, MODEL)
    own = digests.calibration_digest(after, MODEL, "other")
    assert own != digests.calibration_digest(before, MODEL)
    for scheme in before.schemes:
        pair = [digests.quantizer_digest(study, MODEL, scheme) for study in (before, after)]
        assert (pair[0] != pair[1]) is (scheme == name)


def test_a_scheme_that_needs_whole_tokens_changes_what_is_collected_and_no_digest(
    raw: dict[str, Any],
) -> None:
    """So that results which were there before stay, while the workflow calibrates again."""
    more = {**raw, "schemes": {**raw["schemes"], "cq-4c8b": {"kind": "cq"}}}
    before, after = every_digest(parse_study(raw)), every_digest(parse_study(more))
    assert before == {name: after[name] for name in before}
    studies = [parse_study(raw), parse_study(more)]
    collected = [digests.collection_digest(study, MODEL) for study in studies]
    assert collected == [before["calibrate"], f"{before['calibrate']}+4096"]


def test_statistics_are_up_to_date_for_a_scheme_if_they_have_its_whole_tokens(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    more = {"cq": {"kind": "cq"}, "cq-few": {"kind": "cq", "samples": 300}}
    study = parse_study({**raw, "schemes": {**raw["schemes"], **more}})
    # 6 windows of 512 tokens without their first one are fewer than 4096
    wanted = {"cq": 6 * 511, "cq-few": 300, "nuq3-1pct": 0, "fp16": 0}
    assert {name: digests.samples_of(study, name) for name in wanted} == wanted
    for held, served in ((None, 0), (300, 300), (3066, 3066), ("many", -1)):
        file = tmp_path / f"{held}.json"
        info = {"spec_digest": "d"} | ({} if held is None else {"samples": held})
        file.write_text(json.dumps(info))
        for needed in wanted.values():
            assert digests.settled(str(file), "d", needed) == (needed <= served)
        assert not digests.settled(str(file), "other")


def test_a_scheme_of_keys_after_rope_changes_what_is_collected_and_no_digest(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    more = {"nuq3-after-rope": {"kind": "nuq", "bits": 3, "keys": "after-rope"}}
    changed = {**raw, "schemes": {**raw["schemes"], **more}}
    before, after = every_digest(parse_study(raw)), every_digest(parse_study(changed))
    assert before == {name: after[name] for name in before}
    study = parse_study(changed)
    found = digests.collection_digest(study, MODEL)
    assert found == f"{before['calibrate']}+roped-keys"
    both = parse_study({**changed, "schemes": {**changed["schemes"], "cq": {"kind": "cq"}}})
    assert digests.collection_digest(both, MODEL) == f"{before['calibrate']}+4096+roped-keys"
    assert [digests.roped_keys_of(study, s) for s in (*more, "nuq3-1pct", "fp16")] == [
        True, False, False,
    ]  # fmt: skip
    for held, served in ((None, False), (True, True), ("true", False)):
        file = tmp_path / f"{held}.json"
        info = {"spec_digest": "d"} | ({} if held is None else {"roped_keys": held})
        file.write_text(json.dumps(info))
        assert digests.settled(str(file), "d", 0, roped_keys=True) is served
        assert digests.settled(str(file), "d", 0)
        assert not digests.settled(str(file), "d", 1, roped_keys=True)


def test_only_the_calibration_of_such_a_scheme_keeps_keys_after_rope(raw: dict[str, Any]) -> None:
    raw["calibrations"] = {"other": {"windows": 3}}
    raw["schemes"]["after"] = {
        "kind": "nuq", "bits": 3, "keys": "after-rope", "calibration": "other",
    }  # fmt: skip
    study = parse_study(raw)
    assert not study.keys_after_rope() and study.keys_after_rope("other")


def test_append_depends_on_its_own_section_and_schemes(raw: dict[str, Any]) -> None:
    assert changed(raw, "append", "rounds", value=7) == {"append"}
    assert changed(raw, "append", "minutes", value=7) == set()
    found = changed(raw, "schemes", "nuq3-1pct", "sinks", value=4)
    assert "append" in found  # the headline scheme
    assert "append" not in changed(raw, "schemes", "kivi-2", "residual", value=64)
    assert "append" not in changed(raw, "models", "smollm2-135m", "mem_gb", value=9)


def test_kernels_depend_on_their_case_and_its_schemes(root: Path) -> None:
    raw = yaml.safe_load((root / "config/smoke.yaml").read_text())
    case = {"shape": "tiny", "tokens": 64, "measure": ["prefill"]}
    raw["kernels"]["cases"] = {"one": case, "two": {**case, "peers": ["kivi-2"]}}

    def found(*keys: str, value: Any) -> set[str]:
        other = yaml.safe_load(yaml.safe_dump(raw))
        at = other
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        before, after = parse_study(raw), parse_study(other)
        return {
            name
            for name in ("one", "two")
            if digests.kernels_digest(before, name) != digests.kernels_digest(after, name)
        }

    assert found("kernels", "cases", "one", "tokens", value=96) == {"one"}
    assert found("schemes", "kivi-2", "residual", value=64) == {"two"}
    assert found("schemes", "nuq3-1pct", "sinks", value=4) == {"one", "two"}
    assert found("kernels", "rounds", value=7) == {"one", "two"}
    assert found("kernels", "minutes", value=7) == set()
    with pytest.raises(UserError, match="unknown case 'thre'"):
        digests.kernels_digest(parse_study(raw), "thre")


def test_timing_changes_its_own_stage(raw: dict[str, Any]) -> None:
    for stage, key, value in (("throughput", "warmup", 3), ("energy", "trials", 4)):
        found = changed(raw, stage, key, value=value)
        assert {name.split("/")[0] for name in found} == {{"throughput": "perf"}.get(stage, stage)}


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("title",), "another"),
        (("seeds",), [0, 1]),
        (("statistics", "alpha"), 0.01),
        (("pathvars", "results"), "elsewhere"),
        (("tasks", "ppl-b", "minutes"), 7),
        (("tasks", "ppl-b", "batch_size"), 7),
        (("evaluation",), {"batch_tokens": 5000}),
        (("throughput", "reps"), 2),
    ],
)
def test_what_no_result_depends_on(raw: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    assert changed(raw, *keys, value=value) == set()


def test_a_fetched_model_does_not_depend_on_the_machine(root: Path) -> None:
    demo, h100 = (load_study(root / f"config/{n}.yaml").models[MODEL] for n in ("demo", "config"))
    assert demo.gpus != h100.gpus
    assert digests.weights_digest(demo) == digests.weights_digest(h100)
    other = demo.model_copy(update={"sha256": "0" * 64})
    assert digests.weights_digest(other) != digests.weights_digest(demo)


def test_results_do_not_depend_on_how_many_gpus_share_the_layers(root: Path) -> None:
    study = load_study(root / "config/config.yaml")
    raw = study.model_dump(mode="json", exclude_defaults=True)
    assert study.model(MODEL).gpus == 1
    assert changed(raw, "models", MODEL, "gpus", value=8) == set()
    # Published digests tell a CPU's from a GPU's.
    assert changed(raw, "models", MODEL, "gpus", value=0)


def test_a_case_of_several_gpus_is_another(root: Path) -> None:
    raw = load_study(root / "config/config.yaml").model_dump(mode="json", exclude_defaults=True)
    case = next(iter(raw["jobs"]["cases"]))
    before = digests.jobs_digest(parse_study(raw), case)
    for gpus, same in ((None, True), (2, False)):
        raw["jobs"]["cases"][case]["gpus"] = gpus
        assert (digests.jobs_digest(parse_study(raw), case) == before) is same


def test_results_depend_on_the_dtype_of_a_model_and_what_is_fetched_does_not(
    raw: dict[str, Any],
) -> None:
    study = parse_study(raw)
    task = next(name for name, spec in study.tasks.items() if digests.asks_prompts(spec))
    raw["models"][MODEL]["dtype"] = "bfloat16"
    other = parse_study(raw)
    assert digests.weights_digest(other.model(MODEL)) == digests.weights_digest(study.model(MODEL))
    assert digests.prompts_digest(other, MODEL, task) == digests.prompts_digest(study, MODEL, task)
    before, after = every_digest(study), every_digest(other)
    assert {name for name in before if before[name] == after[name]} == {"append"}


def test_an_option_added_later_leaves_older_digests(raw: dict[str, Any]) -> None:
    raw["schemes"]["kivi-2"].pop("sinks", None)
    named = yaml.safe_load(yaml.safe_dump(raw))
    named["schemes"]["kivi-2"]["sinks"] = 0
    assert every_digest(parse_study(raw)) == every_digest(parse_study(named))
    # as the published records of KIVI have it
    scheme = {"kind": "kivi", "bits": 2, "group": 32, "residual": 32}
    assert parse_study(raw).scheme("kivi-2").model_dump(mode="json") == scheme
    found = changed(raw, "schemes", "kivi-2", "sinks", value=1)
    assert {n.split("/")[1] for n in found} == {"kivi-2"}
    named["schemes"]["kivi-2"]["sinks"] = 1
    kept = parse_study(parse_study(named).model_dump(mode="json"))
    assert kept.scheme("kivi-2") == parse_study(named).scheme("kivi-2")


def test_keys_before_rope_leave_the_digests_of_nuq(raw: dict[str, Any]) -> None:
    named = yaml.safe_load(yaml.safe_dump(raw))
    named["schemes"]["nuq3-1pct"]["keys"] = "before-rope"
    assert every_digest(parse_study(raw)) == every_digest(parse_study(named))
    # as the published records and quantizers of NUQ have it
    scheme: dict[str, Any] = {"kind": "nuq", "bits": 3, "outliers": 0.01, "sinks": 1}
    scheme |= {"block_size": 32, "datatype": "nuq", "weighting": "fisher-range2", "q_norm": False}
    assert parse_study(named).scheme("nuq3-1pct").model_dump(mode="json") == scheme
    found = changed(raw, "schemes", "nuq3-1pct", "keys", value="after-rope")
    assert {n.split("/")[1] for n in found if "/" in n} == {
        "nuq3-1pct"
    } and "calibrate" not in found


@pytest.mark.parametrize("scheme", ["nuq3-1pct", "kivi-2"])
def test_16_bit_attention_of_prompts_leaves_older_digests(raw: dict[str, Any], scheme: str) -> None:
    named = yaml.safe_load(yaml.safe_dump(raw))
    named["schemes"][scheme]["prompt_attention"] = "16-bit"
    assert every_digest(parse_study(raw)) == every_digest(parse_study(named))
    assert "prompt_attention" not in parse_study(named).scheme(scheme).model_dump(mode="json")
    found = changed(raw, "schemes", scheme, "prompt_attention", value="8-bit")
    assert {n.split("/")[1] for n in found if "/" in n} == {scheme} and "calibrate" not in found
    calibrated = parse_study(raw).scheme(scheme).registration.calibrated
    assert (f"quantize/{scheme}" in found) is not calibrated  # its tables are the same
    assert any(name.startswith(f"eval/{scheme}/") for name in found)


def test_schemes_that_differ_in_the_attention_of_prompts_share_a_quantizer(
    raw: dict[str, Any],
) -> None:
    eight = {**raw["schemes"]["nuq3-1pct"], "prompt_attention": "8-bit"}
    raw["schemes"] |= {"twin": eight, "alone": {**eight, "outliers": 0.02}}
    study = parse_study(raw)
    used = {name: digests.tables_scheme(study, name) for name in study.schemes}
    assert used == {name: name for name in study.schemes} | {"twin": "nuq3-1pct"}
    both = (digests.quantizer_digest(study, MODEL, name) for name in ("twin", "nuq3-1pct"))
    assert len(set(both)) == 1
