"""Variants of a study: what a `base` gives, and every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kvquant.errors import UserError
from kvquant.study.config import load_study
from kvquant.study.overlay import merged, read_studies, read_study


def write(folder: Path, **files: Any) -> None:
    """Writes studies as YAML files of these names."""
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def test_mappings_are_merged_and_other_values_replaced() -> None:
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}
    above = {"a": {"y": [3], "new": 2}, "b": {"now": "a mapping"}, "c": 5, "d": None}
    assert merged(below, above) == {
        "a": {"x": 1, "y": [3], "new": 2},
        "b": {"now": "a mapping"},
        "c": 5,
        "d": None,
    }
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}


def test_null_leaves_out_an_entry_of_the_base() -> None:
    below = {"tasks": {"x": {"suite": "ppl"}, "y": {"suite": "ruler"}}, "append": {"reps": 1}}
    above = {"tasks": {"x": None}, "append": None}
    assert merged(below, above) == {"tasks": {"y": {"suite": "ruler"}}}
    assert merged({"tasks": {"x": ["a"], "y": ["b"]}}, {"tasks": {"x": None}}) == {
        "tasks": {"y": ["b"]}
    }


def test_null_over_a_number_is_null_and_not_its_default() -> None:
    assert merged({"margin": {"relative": 0.02}}, {"margin": {"relative": None}}) == {
        "margin": {"relative": None}
    }


@pytest.mark.parametrize("name", ["a\0b", "a\nb.yaml", "loop.yaml"])
def test_a_base_that_no_file_can_have_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("other.yaml")
    (tmp_path / "other.yaml").symlink_to("loop.yaml")
    write(tmp_path, study={"base": name})
    with pytest.raises(UserError, match="base") as refused:
        read_study(tmp_path / "study.yaml")
    assert "\n" not in str(refused.value)


def test_order_is_that_of_the_base() -> None:
    found = merged({"a": 1, "b": 2}, {"c": 3, "a": 4})
    assert list(found.items()) == [("a", 4), ("b", 2), ("c", 3)]


def test_a_base_may_have_a_base_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, first={"a": 1, "b": 1, "c": 1})
    write(tmp_path / "inner", second={"base": "../first.yaml", "b": 2, "c": 2})
    write(tmp_path, third={"base": "inner/second.yaml", "c": 3})
    assert read_study(tmp_path / "third.yaml") == {"a": 1, "b": 2, "c": 3}


def test_the_cluster_study_is_a_variant_of_the_default_study(root: Path) -> None:
    base, cluster = (load_study(root / f"config/{name}.yaml") for name in ("config", "athena"))
    same = {n for n in type(base).model_fields if getattr(base, n) == getattr(cluster, n)}
    assert same >= {"seeds", "baseline", "headline", "calibration", "append"}
    assert all(base.schemes[name] == scheme for name, scheme in cluster.schemes.items())
    assert cluster.published is None and not set(base.models) & set(cluster.models)
    folders = [set(study.pathvars.values()) for study in (base, cluster)]
    assert not folders[0] & folders[1]  # neither writes into the other's


@pytest.mark.fault("files", "a study's `base` that is missing, no study or a circle", "one line")
@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("none.yaml", r"study\.yaml: base: no such file: .*none\.yaml$"),
        (".", r"study\.yaml: base: .*: a folder, not a file$"),
        (3, r"study\.yaml: base: must be the name of a study file"),
        (None, r"study\.yaml: base: must be the name of a study file"),
        ("study.yaml", r"study\.yaml: base: a study cannot be its own base: .* -> .*study\.yaml$"),
        ("circle.yaml", r"circle\.yaml: base: a study cannot be its own base: .* -> .* -> "),
        ("list.yaml", r"study\.yaml: base: .*list\.yaml does not hold a mapping of keys$"),
        ("damaged.yaml", r"damaged\.yaml: not valid YAML: line 1"),
    ],
)
def test_bases_that_cannot_be_used(tmp_path: Path, base: Any, message: str) -> None:
    write(tmp_path, study={"base": base}, circle={"base": "./study.yaml"}, list=[1])
    (tmp_path / "damaged.yaml").write_text("a: [")
    with pytest.raises(UserError, match=message) as caught:
        load_study(tmp_path / "study.yaml")
    assert "\n" not in str(caught.value)


def test_later_files_and_values_win(tmp_path: Path) -> None:
    write(tmp_path, own={"a": 1, "b": 1, "c": 1, "d": 1}, base={"b": 2, "c": 2, "d": 2})
    write(tmp_path, variant={"base": "base.yaml", "c": 3, "d": 3})
    files = [tmp_path / "own.yaml", tmp_path / "variant.yaml"]
    assert read_studies(files, {"d": 4}) == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_a_config_file_must_be_a_mapping(tmp_path: Path) -> None:
    write(tmp_path, study=[1, 2])
    with pytest.raises(UserError, match=r"study\.yaml: expected a mapping of keys, got list"):
        read_studies([tmp_path / "study.yaml"], {})
