"""Which records something comes from."""

from __future__ import annotations

import pandas as pd

from kvquant.analysis.provenance import digest, records_of, short, told


def test_records_of_rows() -> None:
    rows = pd.DataFrame({"record": ["a", "b", "a", None]})
    assert records_of(rows, pd.DataFrame({"other": [1]}), pd.DataFrame()) == {"a", "b"}


def test_the_hash_is_of_the_set() -> None:
    assert digest(["b", "a"]) == digest(["a", "b", "a"]) != digest(["a"])
    assert digest([]) == "" and len(digest(["a"])) == len(short("f" * 64)) == 12


def test_it_is_told_in_words() -> None:
    assert told(["a"]) == f"1 record {digest(['a'])}"
    assert told([]) == "0 records"
