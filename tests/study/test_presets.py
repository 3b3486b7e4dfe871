"""Short names of schemes: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.study.config import load_study
from kvquant.study.presets import PRESETS, headline_scheme, scheme_from, scheme_presets
from kvquant.study.schemes import SCHEME_KINDS, KiviScheme


def test_names_of_the_default_study_mean_the_same(root: Path) -> None:
    study = load_study(root / "config/config.yaml")
    both = PRESETS.keys() & study.schemes.keys()
    assert {"allocated-3", "nuq3-1pct", "kivi-2", "fp8", "cq-4c8b", "hf-quanto-4"} <= both
    for name in both:
        assert PRESETS[name].scheme == study.scheme(name), name


def test_names_lead_to_registered_kinds() -> None:
    kinds = {scheme.kind for scheme in scheme_presets().values()}
    assert {"allocated", "nuq", "kivi", "fp8", "int4-hadamard", "hf-quanto"} <= kinds
    assert kinds <= set(SCHEME_KINDS)


def test_bits_may_be_a_float() -> None:
    assert headline_scheme(3.0) is headline_scheme(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_bits_choose_allocated_codes(bits: int) -> None:
    scheme = headline_scheme(bits)
    assert (scheme.kind, getattr(scheme, "bits")) == ("allocated", bits + 0.4)  # noqa: B009


@pytest.mark.parametrize("bits", [5, 1, 3.0001, True])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match=r"bits: .* is none of 4, 3 and 2"):
        headline_scheme(bits)


def test_a_scheme_is_a_name_options_or_itself() -> None:
    wanted = KiviScheme(kind="kivi", bits=4)
    assert scheme_from("kivi-4") == wanted
    assert scheme_from({"kind": "kivi", "bits": 4}) == wanted
    assert scheme_from(wanted) is wanted


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("kivi4", "unknown scheme 'kivi4': did you mean kivi-4"),
        ("???", "unknown scheme '???': known: allocated-2, "),
        ({"bits": 3}, "unknown scheme kind 'None'"),
        ({"kind": "kivy", "bits": 3}, "unknown scheme kind 'kivy': did you mean kivi"),
        ({"kind": "kivi", "bits": 5}, "scheme.bits: "),
        ({"kind": "kivi", "bits": "4"}, "scheme.bits: '4' is text"),
        ({"kind": "kivi", "bits": 4, "width": 3}, "scheme.width: unknown option of kind 'kivi'"),
        (3, "scheme: must be a name, a mapping with a kind or a scheme, got int"),
    ],
)
def test_what_is_unknown_is_told_in_one_line(given: object, told: str) -> None:
    with pytest.raises(UserError) as error:
        scheme_from(given)  # type: ignore[arg-type]
    assert told in str(error.value)
    assert "\n" not in str(error.value)
