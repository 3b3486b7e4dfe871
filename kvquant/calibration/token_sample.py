"""Whole tokens that calibration keeps for schemes that need several channels of a token at once.

Histograms and second moments say nothing of the joint distribution of a few channels. Where a study
names a scheme that needs it, the pass keeps the keys and values of some tokens, and their
gradients. Which tokens is drawn before the pass, without replacement, so that memory is bounded by
their number and each token of all windows is as likely as any other. They lie in random order:
the first half of a sample is a sample itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Tables of :class:`LayerStatistics` and their dtypes. Of gradients the range matters more than the
# last digits.
SAMPLES = {
    "key_sample": torch.float16,
    "key_gradient_sample": torch.bfloat16,
    "value_sample": torch.float16,
    "value_gradient_sample": torch.bfloat16,
}
LARGEST = torch.finfo(torch.float16).max


class TokenSample:
    """Collects the drawn tokens of one pass, on the CPU.

    Args:
        lengths: Tokens of each window that count.
        count: Number of tokens to keep, if the windows have as many.
        seed: Of the draw.

    Attributes:
        size: Number of tokens that are kept per layer.
    """

    def __init__(self, lengths: Sequence[int], count: int, seed: int) -> None:
        total = sum(lengths)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(total, generator=generator)[:count]
        self.size = len(chosen)
        ends = torch.tensor(lengths).cumsum(0)
        window = torch.searchsorted(ends, chosen, right=True)
        self._drawn = []
        for number, length in enumerate(lengths):
            places = (window == number).nonzero().view(-1)
            self._drawn.append((chosen[places] - (ends[number] - length), places))
        self._tables: dict[tuple[int, str], torch.Tensor] = {}

    def add(self, window: int, layer: int, name: str, x: torch.Tensor) -> None:
        """Adds the drawn rows of a window's tokens.

        Args:
            window: Number of the window.
            layer: Number of the layer.
            name: Of the table.
            x: `[tokens, channels]`, all tokens of the window that count. Numbers beyond the range
                of fp16 are clamped to it.
        """
        rows, places = self._drawn[window]
        dtype = SAMPLES[name]
        if (layer, name) not in self._tables:
            self._tables[layer, name] = torch.zeros(self.size, x.shape[1], dtype=dtype)
        drawn = x[rows.to(x.device)]
        if dtype is torch.float16:
            drawn = drawn.clamp(-LARGEST, LARGEST)
        self._tables[layer, name][places] = drawn.to(dtype).cpu()

    def of_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Returns the tables of a layer by their names."""
        return {name: self._tables[layer, name] for name in SAMPLES}
