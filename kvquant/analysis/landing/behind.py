"""The figures and tables behind each claim, to which the landing page links.

A claim without an entry links to the table of claims alone.
"""

from __future__ import annotations

from collections.abc import Mapping

# Name of a claim: names of figures, then of pages (kvquant/analysis/figure_list.py, page_list.py).
BEHIND: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "loss-grows": (("perplexity",), ("tests", "accuracy")),
    "half-the-loss": (("perplexity",), ("summary", "accuracy")),
    "loss-on-7b": (("perplexity",), ("tests",)),
    "passkey-kept": (("passkey",), ("tests",)),
    "bits-per-element": (("pareto",), ("jobs", "summary")),
    "prefill-speed": (("throughput", "kernels"), ("throughput",)),
    "quantization-share": ((), ("throughput",)),
    "energy-per-token": (("pareto",), ("energy",)),
    "append-growth": (("append",), ()),
    "prefill-over-kvquant": (("kernels",), ("throughput",)),
    "capacity": ((), ("capacity",)),
    "job-speed": ((), ("jobs",)),
    "job-energy": ((), ("job-energy",)),
    "prefill-energy": ((), ("job-energy",)),
    "generate-speed": ((), ("jobs",)),
}


def behind(claim: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the figures and of the pages behind a claim.

    Args:
        claim: The claim's name; an unknown one has nothing of its own.
    """
    return BEHIND.get(claim, ((), ()))
