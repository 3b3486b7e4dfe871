"""Stands in for `python -m kvquant VERB` in tests of the DAG: outputs without measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# kvquant is imported where it is needed: most verbs then take a tenth of the time.


def options(words: list[str]) -> dict[str, list[str]]:
    """{option: its values} of a command line."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            current = found.setdefault(word[2:], [])
        else:
            current.append(word)
    return found


def outputs(verb: str, given: dict[str, list[str]]) -> list[Path]:
    """The files that the verb would write."""
    folder = Path(given["out-dir"][0]) if "out-dir" in given else Path()
    files = [Path(f) for key in ("out", "tex", "numbers") for f in given.get(key, [])]
    if verb in ("calibrate", "quantize"):
        files += [files[0].with_suffix(s) for s in (".json", ".safetensors")]
    elif verb == "evaluate":
        files += [
            folder / f"seed{seed}" / name
            for seed in given["seeds"]
            for name in ("run.json", "samples.jsonl")
        ]
    elif verb in ("kernels", "jobs"):
        files += [folder / f"{case}.json" for case in given["cases"]]
    elif verb == "tables":
        from kvquant.analysis import table_list
        from kvquant.study.config import load_study

        files += [folder / f"{name}.tex" for name in table_list.of_study(load_study("study.yaml"))]
        beside = [file for file in files if file.name == "numbers.tex"]
        files += [f.with_name(name) for f in beside for name in ("floats.tex", "numbers.csv")]
    tables = {
        "aggregate": ("eval", "samples", "perf", "energy", "append", "kernels"),
        "statistics": ("tests",),
        "pareto": ("pareto",),
    }
    return files + [
        folder / f"{name}.{kind}" for name in tables.get(verb, ()) for kind in ("parquet", "csv")
    ]


def content(verb: str, given: dict[str, list[str]]) -> str:
    """What is written: the digest, where the workflow looks for it."""
    if verb not in ("fetch-model", "calibrate", "quantize"):
        return verb
    from kvquant.study import digests
    from kvquant.study.config import load_study

    study, model = load_study("study.yaml"), given["model"][0]  # no hook wrote study.json
    if verb == "fetch-model":
        found = digests.weights_digest(study.model(model))
    elif verb == "calibrate":
        found = digests.calibration_digest(study, model)
    else:
        found = digests.quantizer_digest(study, model, given["scheme"][0])
    return json.dumps({"spec_digest": found})


if __name__ == "__main__":
    verb, *rest = sys.argv[2:] if sys.argv[1] == "bench" else sys.argv[1:]
    text = content(verb, options(rest))
    for file in outputs(verb, options(rest)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
