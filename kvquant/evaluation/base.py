"""What a suite returns for one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class SuiteResult:
    """Samples and metrics of one (model, scheme, task, seed).

    Attributes:
        protocol: "A" or "B" (see :class:`kvquant.cache.KVQuantCache`).
        metric: Name of the metric that statistics use; a key of `metrics`.
        higher_is_better: Its direction.
        metrics: All metrics.
        samples: One row a sample, with `sample_id` and `score`.
        tokens: Tokens that went through the cache.
        cache_bytes: Bytes allocated by the caches.
        cache_elements: Key and value elements in them.
    """

    protocol: Literal["A", "B"]
    metric: str
    higher_is_better: bool
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    tokens: int
    cache_bytes: int
    cache_elements: int
