"""`kvquant schema`: the JSON schema of a study file, for editors and for the drift test."""

from __future__ import annotations

import argparse
import json

from kvquant.study.config import json_schema


def schema_text() -> str:
    """Returns the schema as committed in config/schema.json."""
    return json.dumps(json_schema(), indent=2, sort_keys=True) + "\n"


def run(args: argparse.Namespace) -> None:
    """Writes the schema."""
    args.out.write_text(schema_text(), encoding="utf-8")
    print(f"schema: written to {args.out}")
