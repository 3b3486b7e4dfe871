"""Names that readers see: derived from options, told apart, and without a trace in any digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from kvquant.errors import UserError
from kvquant.study import digests
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.config import Study, load_study, parse_study
from kvquant.study.own_schemes import AllocatedScheme
from kvquant.study.scheme_kinds import SCHEME_KINDS
from kvquant.study.schemes import SchemeSpec
from kvquant.study.wording import short_count, told_apart
from tests.support.studies import LONG_CALLS, study_of

STUDIES = (
    "config",
    "athena",
    "quality",
    "ablation",
    "attention",
    "attention_gemma",
    "gemma",
    "demo",
)


def names(schemes: dict[str, dict[str, Any]], **reserved: Any) -> dict[str, str]:
    """The names of schemes, besides fp16."""
    all_schemes = {"fp16": {"kind": "fp16"}, **schemes}
    study = study_of(schemes=all_schemes, headline="fp16", tasks=LONG_CALLS)
    found = told_apart(study.schemes, **reserved)
    assert found.pop("fp16") == "16-bit cache"
    return found


def test_names_say_method_bits_and_outliers() -> None:
    assert names(
        {
            "nuq3-1pct": {"kind": "nuq", "bits": 3},
            "nf3": {"kind": "nuq", "bits": 3, "datatype": "nf"},
            "k4v2": {"kind": "kvarn", "bits": 4, "value_bits": 2},
            "k4": {"kind": "kvarn", "bits": 4},
            "ours": {"kind": "allocated", "bits": 3.35},
        }
    ) == {
        "nuq3-1pct": "NUQ 3 bits, 1 % outliers",
        "nf3": "NF 3 bits, 1 % outliers",
        "k4v2": "KVarN 4/2 bits",
        "k4": "KVarN 4 bits",
        "ours": "Allocated codes 3.35 bits",
    }


def test_keys_after_rope_are_told() -> None:
    spec: dict[str, Any] = {"kind": "nuq", "bits": 3}
    assert names({"a": spec, "b": {**spec, "keys": "after-rope"}}) == {
        "a": "NUQ 3 bits, 1 % outliers",
        "b": "NUQ 3 bits, 1 % outliers, keys after RoPE",
    }


def test_8_bit_attention_is_a_part_of_names() -> None:
    """Also where no other scheme has the same cache."""
    eight = {"prompt_attention": "8-bit"}
    assert names(
        {
            "a": {"kind": "fp16", **eight},
            "b": {"kind": "nuq", "bits": 3, **eight},
            "c": {"kind": "nuq", "bits": 3},
            "d": {"kind": "nuq", "bits": 3, "sinks": 0, **eight},
        }
    ) == {
        "a": "16-bit cache, 8-bit attention",
        "b": "NUQ 3 bits, 1 % outliers, 8-bit attention",
        "c": "NUQ 3 bits, 1 % outliers",
        "d": "NUQ 3 bits, 1 % outliers, 8-bit attention, no sink",
    }


def test_a_kind_with_an_attention_of_its_own_has_no_8_bit_one() -> None:
    scheme = {"kind": "kvquant-ref", "bits": 3, "prompt_attention": "8-bit"}
    with pytest.raises(UserError, match=r"schemes.own: prompt_attention: kind 'kvquant-ref'"):
        names({"own": scheme})


def test_options_tell_schemes_of_one_title_apart() -> None:
    kivi: dict[str, Any] = {"kind": "kivi", "bits": 4}
    assert names(
        {
            "a": kivi,
            "b": {**kivi, "sinks": 1},
            "c": {**kivi, "sinks": 1, "residual": 0},
            "d": {**kivi, "bits": 2, "residual": 0},
        }
    ) == {
        "a": "KIVI 4 bits",
        "b": "KIVI 4 bits, 1 sink",
        "c": "KIVI 4 bits, no window, 1 sink",
        "d": "KIVI 2 bits",  # nothing to tell apart
    }


def test_names_never_collide() -> None:
    fp8: dict[str, Any] = {"kind": "fp8"}
    found = names({"a": fp8, "b": fp8, "c": {**fp8, "label": "FP8 (a)"}})
    assert found == {"a": "FP8 (a) (a)", "b": "FP8 (b)", "c": "FP8 (a)"}
    assert names({"a": fp8}, reserved=["FP8"]) == {"a": "FP8 (a)"}


@pytest.mark.parametrize("file", STUDIES)
def test_all_names_of_the_studies_differ_and_are_no_keys(root: Path, file: str) -> None:
    study = load_study(root / f"config/{file}.yaml")
    for specs in (
        study.schemes,
        study.tasks,
        study.throughput.workloads,
        study.energy.workloads,
    ):
        found = told_apart(specs)
        assert list(found) == list(specs) and len(set(found.values())) == len(found)
        assert not set(found) & set(found.values())
        assert not any(f"({key})" in name for key, name in found.items())


def test_tasks_say_data_and_protocol(root: Path) -> None:
    found = told_apart(load_study(root / "config/config.yaml").tasks)
    assert found["ppl-wikitext2-b"] == "Wikitext-2, protocol B"
    assert found["ppl-wikitext2-full-b"] == "Wikitext-2, protocol B, windows of 8,192"
    assert found["ruler-niah-multikey-2"] == "RULER NIAH multikey 2"
    athena = told_apart(load_study(root / "config/athena.yaml").tasks)  # of other models
    assert athena["ppl-wikitext2-full-b"] == "Wikitext-2, protocol B, full windows"
    assert found["longbench-retrieval"] == "LongBench PassageRetrieval-en"
    assert found["passkey-8k"] == "passkey, 8,180 tokens"


def labelled(study: Study) -> Study:
    """The same study with a label on everything that can have one."""
    raw = study.model_dump(mode="json")
    groups = [raw["models"], raw["schemes"], raw["tasks"]]
    groups += [raw[stage]["workloads"] for stage in ("throughput", "energy")]
    for group in groups:
        for n, entry in enumerate(group.values()):
            entry["label"] = f"Label {n}"
    return parse_study(raw)


def all_digests(study: Study) -> list[str]:
    """Every digest that records of a study have."""
    found = [digests.append_digest(study)] + [
        digests.kernels_digest(study, case) for case in study.kernel_cases()
    ]
    for model in study.models:
        found.append(digests.weights_digest(study.models[model]))
        found.append(digests.calibration_digest(study, model))
        found += [digests.quantizer_digest(study, model, s) for s in study.schemes]
        found += [digests.prompts_digest(study, model, t) for t in study.tasks]
        found += [digests.eval_digest(study, model, s, t, 0) for s, t in study.eval_cells()]
        found += [digests.perf_digest(study, model, s, w) for s, w, _ in study.throughput_cells()]
        found += [digests.energy_digest(study, model, s, w) for s, w, _ in study.energy_cells()]
    return found


def test_a_label_is_the_name_and_changes_no_record(root: Path) -> None:
    study = load_study(root / "config/config.yaml")
    named = labelled(study)
    assert told_apart(named.schemes)["fp16"] == "Label 0"
    assert all_digests(named) == all_digests(study)
    # what reads the study as a whole is made again
    assert digests.digest(named) != digests.digest(study)


def test_labels_that_cannot_be_are_refused() -> None:
    fp8 = {"kind": "fp8"}
    for label, reason in (
        ("two\nlines", r"schemes.a.label: must be one line"),
        ("x" * 61, r"schemes.a.label: .*60"),
        ("same", r"schemes.b.label: is that of 'a' too"),
        ("concatenated arrays", r"schemes.a.label: .* is taken by figures"),
    ):
        schemes: dict[str, Any] = {"fp16": {"kind": "fp16"}, "a": {**fp8, "label": label}}
        if label == "same":
            schemes["b"] = {**fp8, "label": label}
        with pytest.raises(UserError, match=reason):
            study_of(schemes=schemes, headline="fp16")


def test_an_option_without_words_reads_as_its_name() -> None:
    from pydantic import TypeAdapter

    found: dict[str, Any] = {
        "a": {"kind": "turboquant", "bits": 3},
        "b": {"kind": "turboquant", "bits": 3, "seed": 1_000},
    }
    specs = {k: TypeAdapter(SchemeSpec).validate_python(v) for k, v in found.items()}
    assert told_apart(specs)["b"] == "TurboQuant 3 bits, seed 1,000"


@pytest.mark.parametrize(("tokens", "said"), [(16384, "16K"), (1000, "1,000"), (0, "0")])
def test_counts_of_tokens(tokens: int, said: str) -> None:
    assert short_count(tokens) == said


def test_options_and_values_have_words_of_their_own() -> None:
    """Also a default has, of which a name says nothing."""
    nuq = study_of().schemes["nuq3"]
    assert nuq.term("block_size") == "tokens per block"
    assert nuq.value_in_words("outliers") == "1 %" and nuq.in_words("outliers") == ""
    assert nuq.value_in_words("sinks") == "1" and nuq.in_words("sinks") == ""
    assert nuq.value_in_words("weighting") == "Fisher, range squared"
    assert nuq.value_in_words("q_norm") == "no" and nuq.value_in_words("calibration") == "not given"
    ours = AllocatedScheme(kind="allocated", bits=3.4)
    assert ours.value_in_words("min_value_width") == "3"
    assert ours.value_in_words("value_range") == "per token"
    assert CalibrationSpec(windows=3).value_in_words("windows") == "6K"
    assert CalibrationSpec().term("windows") == "calibration tokens"


@pytest.mark.parametrize("kind", sorted(SCHEME_KINDS))
def test_every_choice_has_words(kind: str) -> None:
    """An option with a fixed set of values has words for each of them."""
    options = SCHEME_KINDS[kind].options
    for name, field in options.model_fields.items():
        for value in get_args(field.annotation) if "Literal" in str(field.annotation) else ():
            words = options.model_construct(**{name: value}).value_in_words(name)
            assert words and words == words.strip(), name
        assert options.term(name).replace("_", "") == options.term(name)
