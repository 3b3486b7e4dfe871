"""`kvquant study`: validates a study file and writes it with all defaults filled in."""

from __future__ import annotations

import argparse

from kvquant.study.config import digest, load_study


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant study`."""
    study = load_study(args.study)
    text = study.model_dump_json(indent=2) + "\n"
    if args.out is None:
        print(text, end="")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"study: {study.study} (digest {digest(study)}) written to {args.out}")
