"""Recognizes a model in memory by some of its logits for a fixed prompt.

Files of weights have a hash, but a model that is given in memory may have been cast, spread over
devices, quantized or adapted, so that no hash of it tells what it is. Its logits do. Those of
SmolLM2-135M with weights rounded to 16, 8, 4 and 3 bits have a cosine of 1.00, 1.00, 0.92 and 0.57
with its own; those of random weights one of 0.03, and of its own layers in reverse order 0.29.
"""

from __future__ import annotations

from typing import Any

import torch

from kvquant.errors import UserError

TOKENS, LOGITS = 4, 256
MIN_COSINE = 0.5


@torch.inference_mode()
def logits_sample(model: Any) -> list[float] | None:
    """Returns some centred logits for the last token of a fixed prompt; None if not finite.

    Args:
        model: A causal LM.
    """
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(1, TOKENS + 1) * 7919 % weight.shape[0])[None].to(weight.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    chosen = torch.linspace(0, logits.numel() - 1, LOGITS, device=logits.device).long()
    sample = logits[chosen]
    sample = (sample - sample.mean()).cpu()
    if not bool(sample.isfinite().all()):
        return None
    return [float(f"{value:.4g}") for value in sample.tolist()]  # no more digits than are needed


def check_sample(name: str, sample: list[float] | None, model: Any) -> None:
    """Refuses a quantizer whose sample is not that of the model at hand.

    Args:
        name: The quantizer, as messages name it.
        sample: The sample of the model that it was built for; None: unknown.
        model: The model at hand.

    Raises:
        UserError: The model's logits are others.
    """
    found = None if sample is None else logits_sample(model)
    if sample is None or found is None:
        return
    theirs, ours = torch.tensor(sample), torch.tensor(found)
    same = theirs.shape == ours.shape
    if not same or float(torch.cosine_similarity(theirs, ours, dim=0)) < MIN_COSINE:
        raise UserError(
            f"quantizer: {name} was built for a model with other weights (their logits differ): "
            "build one for this model"
        )
