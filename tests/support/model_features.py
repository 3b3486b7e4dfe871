"""What users of transformers do with a model, over any cache, and the models that they have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.support.caches import GREEDY, ids, ragged
from tests.support.models import tiny_model

Use = Callable[[Any, Any], torch.Tensor]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")


def generates(**options: Any) -> Use:
    """Generation for two prompts, of which one is padded on the left; gives the sequences."""

    def sequences(model: Any, cache: Any) -> torch.Tensor:
        _, tokens, mask = ragged([40, 25], "left")
        torch.manual_seed(5)
        found: torch.Tensor = model.generate(
            tokens,
            attention_mask=mask,
            past_key_values=cache,
            **{**GREEDY, "max_new_tokens": 6, **options},
        )
        return found

    return sequences


def assisted(**options: Any) -> Use:
    """Generation from guessed tokens, of which most are taken back; gives the sequence."""

    def sequence(model: Any, cache: Any) -> torch.Tensor:
        assistant = {name: make() for name, make in options.items() if callable(make)}
        found: torch.Tensor = model.generate(
            ids(1, 15).repeat(1, 3),
            past_key_values=cache,
            **{**GREEDY, "max_new_tokens": 12, **options, **assistant},
        )
        return found

    return sequence


def embedded(model: Any, cache: Any) -> torch.Tensor:
    """Logits of calls with embeddings, and the tokens that are generated from them."""
    tokens = ids(1, 45)
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(tokens)
        out = model(inputs_embeds=embeds[:, :30], past_key_values=cache)
        more = model(inputs_embeds=embeds[:, 30:], past_key_values=cache)
    cache.reset()
    found = model.generate(
        inputs_embeds=embeds, past_key_values=cache, **{**GREEDY, "max_new_tokens": 8}
    )
    return torch.cat([out.logits[0], more.logits[0], found[:, -8:].float().repeat(97, 1).T])


def placed(starts: tuple[int, int]) -> Use:
    """Logits of two calls with positions that begin at the given ones."""

    def logits(model: Any, cache: Any) -> torch.Tensor:
        found = []
        for part, start in zip(ids(1, 50).split([30, 20], 1), starts, strict=True):
            at = torch.arange(start, start + part.shape[1])[None]
            with torch.inference_mode():
                found.append(model(part, position_ids=at, past_key_values=cache).logits)
        return torch.cat(found, 1)

    return logits


# By the heading of the column in docs/model-features.md.
FEATURES: dict[str, Use] = {
    "sampling, several sequences": generates(do_sample=True, top_k=7, num_return_sequences=3),
    "beam search": generates(num_beams=3, num_return_sequences=2),
    "prompt lookup": assisted(prompt_lookup_num_tokens=4),
    "assistant model": assisted(assistant_model=functools.cache(lambda: tiny_model(heads=2))),
    "`inputs_embeds`": embedded,
    "`position_ids` from 7 on": placed((7, 37)),
    "`position_ids` that jump": placed((0, 100)),
}


class LowRank(nn.Module):
    """A projection with an adapter of low rank beside it, as PEFT puts in its place."""

    off = False  # as PEFT has its switch, until it is set

    def __init__(self, base: Any, inputs: int, outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(inputs)
        self.base = base
        self.down = nn.Parameter(torch.randn(4, inputs, generator=generator) / 8, False)
        self.up = nn.Parameter(torch.randn(outputs, 4, generator=generator) / 8, False)
        self.rank, self.scaling = 4, {"default": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of both, or the projection alone where the adapter is off."""
        out: torch.Tensor = self.base(x)
        if self.off:
            return out
        return out + self.scaling["default"] * (x @ self.down.T @ self.up.T)


class Coded(nn.Module):
    """A projection with weights of 8 or 4 bits, as libraries that quantize weights make it."""

    def __init__(self, plain: Any, bits: int) -> None:
        super().__init__()
        most = 2 ** (bits - 1) - 1
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.scale, self.bias, self.bits = plain.weight.abs().amax(1) / most, plain.bias, bits
        codes = (plain.weight / self.scale[:, None]).round().to(torch.int8)
        if bits == 4:  # two codes per byte, so that no shape is the projection's
            low, high = (codes.flatten() + 8).to(torch.uint8).view(-1, 2).T
            codes = (low + 16 * high)[:, None]
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies by the decoded weights."""
        codes: torch.Tensor = self.weight
        if self.bits == 4:
            codes = torch.stack((codes[:, 0] % 16, codes[:, 0] // 16), 1).to(torch.int8) - 8
            codes = codes.view(self.out_features, self.in_features)
        weight = (codes * self.scale[:, None]).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def replaced(
    model: Any, by: Callable[[Any], nn.Module], names: tuple[str, ...] = PROJECTIONS
) -> None:
    """Replaces projections of every attention."""
    for layer in model.model.layers:
        for name in names:
            if hasattr(layer.self_attn, name):
                setattr(layer.self_attn, name, by(getattr(layer.self_attn, name)))


def adapted(model: Any, names: tuple[str, ...] = PROJECTIONS) -> None:
    """Gives every attention adapters of its projections."""
    replaced(model, lambda base: LowRank(base, base.in_features, base.out_features), names)
