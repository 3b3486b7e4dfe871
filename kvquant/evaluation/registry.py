"""From a suite's name to the function that runs one seed of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvquant.evaluation import passkey, perplexity, ruler
from kvquant.evaluation.base import SuiteResult

SUITES: dict[str, Callable[[Any, Any, int, str | None], SuiteResult]] = {
    "perplexity": perplexity.run,
    "passkey": passkey.run,
    "ruler": ruler.run,
}
