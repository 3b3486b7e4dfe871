"""Log likelihood of the end of a text, computed through a scheme's cache."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.cache.attending import Protocol
from kvquant.models.finite import not_finite
from kvquant.models.model_call import cache_argument


@torch.inference_mode()
def score(
    qm: Any, protocol: Protocol, tokens: list[int], count: int, dtype: torch.dtype = torch.float32
) -> tuple[float, bool]:
    """Returns the log likelihood of a text's last tokens and whether they are the greedy ones.

    Args:
        qm: A `QuantizedModel`.
        protocol: "A" fills the cache with the beginning, which the end then reads; "B" runs one
            forward pass.
        tokens: Ids of the whole text.
        count: Number of last tokens that are scored, less than the number of `tokens`.
        dtype: dtype of the log likelihoods.

    Raises:
        NonFinite: A logit is NaN, or a scored one infinite.
    """
    ids = torch.tensor([tokens[:-1]], device=qm.device)
    decoder = qm.model.model
    given = {**cache_argument(decoder, qm.new_cache(protocol)), "use_cache": True}
    # The last token before the end predicts the first token of the end.
    past = ids.shape[1] - count if protocol == "A" else 0
    if past > 0:
        decoder(input_ids=ids[:, :past], **given)
    hidden = decoder(input_ids=ids[:, past:], **given).last_hidden_state
    logits = qm.logits(hidden[0, -count:]).float().log_softmax(-1, dtype=dtype)
    goal = torch.tensor(tokens[-count:], device=logits.device)
    chosen = logits.gather(1, goal[:, None])[:, 0]
    good = chosen.isfinite() & ~logits.isnan().any(1)
    if not good.all():
        at = int((~good).int().argmax())
        raise not_finite(qm, f"logits of token {at} of a continuation")
    return float(chosen.sum()), bool((logits.argmax(-1) == goal).all())
