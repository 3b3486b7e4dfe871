"""Which tokens schemes keep in 16 bits, by which figures choose and tell apart schemes of a method.

A token in 16 bits costs bits and spares loss, whatever the method of the others is. Methods are
compared where they keep the same ones.
"""

from __future__ import annotations

from typing import Literal

from kvquant.study.config import Study
from kvquant.study.schemes import SchemeSpec

Kept = Literal["same", "other"]


def kept_tokens(scheme: SchemeSpec, headline: SchemeSpec) -> Kept | None:
    """Returns which tokens a scheme keeps in 16 bits, by which curves are told apart.

    Args:
        scheme: A scheme that quantizes.
        headline: The scheme whose 16-bit tokens are ours.

    Returns:
        "same" for the headline's first tokens and no window of recent ones; "other" for what the
        method's publication keeps (the defaults of its options) and for none; None where it is
        neither, so that it belongs to no curve.
    """

    def tokens(of: SchemeSpec) -> tuple[int, int]:
        return getattr(of, "sinks", 0), getattr(of, "residual", 0)

    fields = type(scheme).model_fields
    published = tuple(
        fields[name].default if name in fields else 0 for name in ("sinks", "residual")
    )
    if tokens(scheme) == tokens(headline):
        return "same"
    return "other" if tokens(scheme) in (published, (0, 0)) else None


def without_variants(study: Study, schemes: list[str]) -> list[str]:
    """Returns schemes without those that differ from a method's others in their 16-bit tokens.

    Of a method with a scheme that keeps the same tokens as the headline scheme, schemes that keep
    others are left out. A method without one is shown as it is.

    Args:
        study: The study.
        schemes: Keys of schemes.
    """
    headline = study.schemes[study.headline]
    of = {key: study.schemes[key] for key in schemes}
    same = {key for key, s in of.items() if s.quantizes and kept_tokens(s, headline) == "same"}
    methods = {of[key].method() for key in same}
    return [key for key in schemes if key in same or of[key].method() not in methods]
