"""Names of schemes and workloads in the field's own words, for figures without their table."""

from __future__ import annotations

from kvquant.study.config import Study, Workload

WORDS = {
    "fp16": "16-bit cache",
    "fp16-static": "16-bit cache, allocated once",
    "nuq": "NUQ",
    "kivi": "KIVI",
    "fp8": "FP8",
    "turboquant": "TurboQuant",
    "int4-hadamard": "INT4-Hadamard",
    "kvquant-ref": "KVQuant's procedure",
    "hf-quanto": "Quanto",
    "hf-hqq": "HQQ",
    "hf-fp8": "FP8, one scale",
}


def _plain(study: Study, key: str) -> str:
    scheme = study.schemes[key]
    datatype = getattr(scheme, "datatype", "nuq")
    name = datatype.upper() if scheme.kind == "nuq" else WORDS.get(scheme.kind, scheme.kind)
    bits = getattr(scheme, "bits", None)
    outliers = getattr(scheme, "outliers", 0.0)
    return (
        name
        + (f" {bits}-bit" if bits else "")
        + (f" + {100 * outliers:g} % outliers" if outliers else "")
    )


def scheme_labels(study: Study) -> dict[str, str]:
    """The label of every scheme; of schemes that differ in other options the key stands behind."""
    plain = {key: _plain(study, key) for key in study.schemes}
    seen = list(plain.values())
    return {k: text if seen.count(text) == 1 else f"{text} ({k})" for k, text in plain.items()}


def workload_label(workload: Workload) -> str:
    """What a workload does, in one phrase."""
    lengths = f"{workload.prompt:,}-token prompt"
    if workload.batch_size > 1:
        shape = ", ragged" if workload.ragged else ""
        lengths = f"{workload.batch_size} x {workload.prompt:,}-token prompts{shape}"
    return lengths + (f" + {workload.answer} new" if workload.answer else "")
