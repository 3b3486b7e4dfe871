"""What one of several GPUs has of a model: the fullest by layers, or each by kv heads."""

from __future__ import annotations

from dataclasses import replace

from kvquant.diagnosis.model_facts import CacheFacts, ModelFacts
from kvquant.errors import UserError
from kvquant.models.placement import even_shares
from kvquant.study.jobs import Split


def part_of_gpu(
    model: ModelFacts, facts: CacheFacts, weights: int, gpus: int, split: Split
) -> tuple[CacheFacts, int]:
    """Returns the facts of one GPU's part of a model, and the bytes of its weights.

    Args:
        model: The model.
        facts: What its cache depends on.
        weights: Bytes of all weights.
        gpus: Number of GPUs.
        split: "layers": the GPU that is full first. "heads": each has the same.

    Raises:
        UserError: So many GPUs cannot share the model.
    """
    if gpus == 1:
        return facts, weights
    if split == "heads":
        if model.gathers is None:
            raise UserError(
                f"--split: transformers has no plan by which processes share the heads of this "
                f"{model.family} model; use --split layers"
            )
        if facts.kv_heads % gpus:
            raise UserError(
                f"--gpus: {gpus} cannot share {facts.kv_heads} kv heads evenly (--split heads); "
                "give a number that divides them"
            )
        own = replace(
            facts,
            heads=facts.heads // gpus,
            kv_heads=facts.kv_heads // gpus,
            widest=-(-facts.widest // gpus),
        )
        return own, -(-weights // gpus)
    layers = model.layer_parameters
    if gpus > len(layers):
        raise UserError(
            f"--gpus: {gpus} GPUs for {len(layers)} layers, each of which is on one as a whole; "
            "ask for fewer"
        )
    first = model.embedding_parameters
    last = model.parameters - sum(layers) - first
    shares = even_shares(layers, gpus, first, last)
    parts: list[tuple[int, int, list[int]]] = []
    for part in range(gpus):
        own_layers = [layer for layer, share in enumerate(shares) if share == part]
        size = sum(layers[layer] for layer in own_layers)
        size += (first if part == 0 else 0) + (last if part == gpus - 1 else 0)
        full = sum(facts.windows[layer] is None for layer in own_layers)
        parts.append((full, size, own_layers))
    _, size, own_layers = max(parts)
    windows = tuple(facts.windows[layer] for layer in own_layers)
    return replace(facts, windows=windows), weights * size // model.parameters
