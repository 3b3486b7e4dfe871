"""Carbon intensities of countries are CodeCarbon's own, and unknown countries are refused."""

from __future__ import annotations

import sys

import pytest

from kvquant.energy import carbon_intensity
from kvquant.energy.carbon_intensity import JOULES_PER_KWH, electricity, knows, source
from kvquant.errors import MissingPackage, UserError

pytest.importorskip("codecarbon")


@pytest.mark.parametrize("country", ["POL", "FRA", "USA", "CHN", "NOR"])
def test_intensity_is_that_of_codecarbons_table(country: str) -> None:
    """Of the country as a whole, also where CodeCarbon has regions."""
    from codecarbon.input import DataSource

    row = DataSource().get_global_energy_mix_data()[country]
    found = electricity(country)
    assert found.grams_per_kwh == pytest.approx(row["carbon_intensity"])
    assert (found.country, found.name, found.year) == (country, row["country_name"], row["year"])
    assert found.grams(2 * JOULES_PER_KWH) == pytest.approx(2 * row["carbon_intensity"])


def test_coal_costs_more_than_nuclear_power() -> None:
    assert electricity("POL").grams_per_kwh > 5 * electricity("FRA").grams_per_kwh > 0


@pytest.mark.parametrize("country", ["XXX", "pol", "PL", ""])
def test_unknown_countries_are_refused(country: str) -> None:
    """CodeCarbon itself would take the world's mean."""
    assert not knows(country)
    with pytest.raises(UserError, match="countries: CodeCarbon knows no country") as refused:
        electricity(country)
    assert "\n" not in str(refused.value)


def test_the_source_has_a_version() -> None:
    import codecarbon

    assert source() == f"CodeCarbon {codecarbon.__version__}"


def test_without_codecarbon_the_field_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon.input", None)
    carbon_intensity.electricity.cache_clear()
    with pytest.raises(MissingPackage, match=r"countries: CodeCarbon's table .*`countries: \[\]`"):
        electricity("POL")
