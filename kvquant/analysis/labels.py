"""Names of schemes and workloads in the field's own words, for figures without their table."""

from __future__ import annotations

from kvquant.study.config import Study
from kvquant.study.datatypes import DATATYPES
from kvquant.study.schemes import NuqScheme
from kvquant.study.timing import Workload


def _plain(study: Study, key: str) -> str:
    scheme = study.schemes[key]
    name = scheme.registration.label
    if isinstance(scheme, NuqScheme):
        name = DATATYPES[scheme.datatype].label
    bits = getattr(scheme, "bits", None)
    values = getattr(scheme, "value_bits", None)
    if values not in (None, bits):
        bits = f"{bits}/{values}"
    outliers = getattr(scheme, "outliers", 0.0)
    return (
        name
        + (f" {bits}-bit" if bits else "")
        + (f" + {100 * outliers:g} % outliers" if outliers else "")
    )


def scheme_labels(study: Study) -> dict[str, str]:
    """Returns each scheme's label, with its key where schemes differ in other options alone."""
    plain = {key: _plain(study, key) for key in study.schemes}
    seen = list(plain.values())
    return {k: text if seen.count(text) == 1 else f"{text} ({k})" for k, text in plain.items()}


def workload_label(workload: Workload) -> str:
    """Returns what a workload does, in one phrase."""
    lengths = f"{workload.prompt:,}-token prompt"
    if workload.batch_size > 1:
        shape = ", ragged" if workload.ragged else ""
        lengths = f"{workload.batch_size} x {workload.prompt:,}-token prompts{shape}"
    return lengths + (f" + {workload.answer} new" if workload.answer else "")
