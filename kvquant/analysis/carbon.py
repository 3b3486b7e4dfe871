"""Grams of CO2e beside measured joules, for the countries that a study names.

They are presentation alone: measured joules of the GPU boards times the mean carbon intensity of a
country's electricity, from CodeCarbon's offline table. An estimate of energy has no grams.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from kvquant.analysis.pareto import counted
from kvquant.analysis.study_tables import Tables
from kvquant.energy.carbon_intensity import electricity, source
from kvquant.study.config import Study

MILLION = 1e6
UNIT = "g CO2e per million tokens"


def grams_per_million(joules_per_token: float, country: str) -> float:
    """Returns the grams of CO2e per million tokens.

    Args:
        joules_per_token: Measured energy; NaN stays NaN.
        country: ISO 3166 code of three letters.
    """
    return electricity(country).grams(MILLION * joules_per_token)


def explained(study: Study) -> str:
    """Returns what grams of CO2e are, with each country's intensity; empty without countries."""
    if not study.countries:
        return ""
    each = ", ".join(
        f"{place.grams_per_kwh:,.0f} g/kWh in {place.name} ({place.country}, {place.year})"
        for place in map(electricity, study.countries)
    )
    return (
        "Grams of CO2e are the measured energy of GPU boards times the mean carbon intensity of "
        f"a country's electricity: {each}, by the offline table of {source()}; nothing else of the "
        "machine is in them."
    )


def has_grams(study: Study, table: pd.DataFrame) -> bool:
    """Returns whether a collected table has energy that counters measured, and countries for it."""
    if not study.countries or "source" not in table:
        return False
    return bool(counted(table)["source"].notna().any())


def of_energy(t: Tables) -> str:
    """Returns the note of a table of energy jobs; empty where nothing was measured by counters."""
    return explained(t.study) if has_grams(t.study, t.energy) else ""


def of_jobs(t: Tables) -> str:
    """Returns the note of a table of whole jobs; empty where nothing was measured by counters."""
    return explained(t.study) if has_grams(t.study, t.jobs) else ""


def with_grams(
    study: Study, table: pd.DataFrame, heads: Mapping[str, str], of: Mapping[str, str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Returns a table and its heads with grams of CO2e behind columns of joules per token.

    Args:
        study: The study, for its countries.
        table: A collected table with the column `source`.
        heads: The heads of its columns.
        of: Which columns hold joules per token, each with what the heads of its grams begin with.
    """
    if not has_grams(study, table):
        return table, dict(heads)
    shown: dict[str, str] = {}
    for column, head in heads.items():
        shown[column] = head
        if column not in of or column not in table:
            continue
        measured = table[column].astype(float).where(table["source"] != "estimated")
        for country in study.countries:
            name = f"{column}_co2_{country}"
            table = table.assign(**{name: measured * grams_per_million(1.0, country)})
            shown[name] = f"{of[column]}{UNIT}, {country}"
    return table, shown
