"""Mean carbon intensity of a country's electricity, from CodeCarbon's offline table.

CodeCarbon itself is imported when a country is asked for, as it takes a part of a second.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from kvquant.errors import MissingPackage, UserError

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Electricity:
    """The electricity of a country.

    Attributes:
        country: ISO 3166 code of three letters.
        name: The country's name.
        year: The year that the intensity is of.
        grams_per_kwh: Grams of CO2e per kWh, the mean of the country.
    """

    country: str
    name: str
    year: int
    grams_per_kwh: float

    def grams(self, joules: float) -> float:
        """Returns the grams of CO2e that so much energy stands for."""
        return joules / JOULES_PER_KWH * self.grams_per_kwh


def _table() -> dict[str, dict[str, Any]]:
    """Returns CodeCarbon's table of countries by their codes.

    Raises:
        MissingPackage: CodeCarbon is not installed, or is broken.
    """
    try:
        from codecarbon.input import DataSource

        return dict(DataSource().get_global_energy_mix_data())
    except (ImportError, OSError) as error:
        raise MissingPackage(
            f"countries: CodeCarbon's table cannot be read ({error}): install codecarbon, or give "
            "`countries: []`"
        ) from None


def knows(country: str) -> bool:
    """Returns whether CodeCarbon's table has a country, by its ISO code of three letters."""
    return country in _table()


def refusal(country: str) -> str:
    """Returns why a country is refused and what to write instead."""
    return (
        f"CodeCarbon knows no country '{country}': write an ISO 3166 code of three capital "
        "letters, such as POL"
    )


@functools.cache
def electricity(country: str) -> Electricity:
    """Returns the electricity of a country as CodeCarbon computes emissions with it.

    Args:
        country: ISO 3166 code of three letters.

    Raises:
        UserError: The table has no such country; CodeCarbon would take the world's mean instead.
        MissingPackage: CodeCarbon is not installed.
    """
    table = _table()
    if country not in table:
        raise UserError(f"countries: {refusal(country)}")
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    kwh, place = Energy.from_energy(kWh=1.0), GeoMetadata(country_iso_code=country)
    kilograms = Emissions(DataSource()).get_country_emissions(kwh, place)
    row = table[country]
    return Electricity(country, str(row["country_name"]), int(row["year"]), 1e3 * kilograms)


def source() -> str:
    """Returns the name and the version of the table's source."""
    return f"CodeCarbon {metadata.version('codecarbon')}"
