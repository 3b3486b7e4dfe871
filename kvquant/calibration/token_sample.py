"""Whole tokens that calibration keeps for schemes that need several channels of a token at once.

Histograms and second moments say nothing of the joint distribution of a few channels. Where a study
names a scheme that needs it, the pass keeps the keys and values of some tokens, and their
gradients. Which tokens is drawn before the pass, without replacement, so that memory is bounded by
their number and each token is as likely as any other. They lie in random order: the first half of
the drawn tokens is a sample itself.

The first tokens of windows (`calibration.sinks`) are unlike all others, and too few for a draw to
meet them reliably. They are kept beside the drawn ones and marked, so that a scheme that quantizes
them has them among its data, with the weight that they have in the text, and one that keeps them in
16 bits has not.
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
MARKS = "sample_sinks"  # the table that marks first tokens, fp32
LARGEST = torch.finfo(torch.float16).max


class TokenSample:
    """Collects the kept tokens of one pass, on the CPU.

    Args:
        lengths: Tokens of each window.
        sinks: First tokens of each window that are kept apart from the drawn ones.
        count: Number of tokens to draw of the others, if there are as many, and the most first
            tokens to keep.
        seed: Of the draws.

    Attributes:
        marks: fp32 `[tokens]`, 0 for drawn tokens; for first tokens, how many of them a kept one
            stands for (1, if all of them are kept).
    """

    def __init__(self, lengths: Sequence[int], sinks: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        window = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        position = torch.cat([torch.arange(length) for length in lengths])
        first, others = ((position < sinks).nonzero(), (position >= sinks).nonzero())
        kept = []
        for tokens in (first.view(-1), others.view(-1)):
            kept.append(tokens[torch.randperm(len(tokens), generator=generator)[:count]])
        self.marks = torch.zeros(len(kept[0]) + len(kept[1]))
        self.marks[: len(kept[0])] = len(first) / max(len(kept[0]), 1)
        chosen = torch.cat(kept)
        self._rows = []
        for number in range(len(lengths)):
            places = (window[chosen] == number).nonzero().view(-1)
            self._rows.append((position[chosen[places]], places))
        self._tables: dict[tuple[int, str], torch.Tensor] = {}

    def add(self, window: int, layer: int, name: str, x: torch.Tensor) -> None:
        """Adds the kept rows of a window.

        Args:
            window: Number of the window.
            layer: Number of the layer.
            name: Of the table.
            x: `[tokens, channels]`, all tokens of the window. Numbers beyond the range of fp16 are
                clamped to it, but for gradients.
        """
        rows, places = self._rows[window]
        dtype = SAMPLES[name]
        if (layer, name) not in self._tables:
            self._tables[layer, name] = torch.zeros(len(self.marks), x.shape[1], dtype=dtype)
        kept = x[rows.to(x.device)].float()
        if dtype is torch.float16:
            kept = kept.clamp(-LARGEST, LARGEST)
        self._tables[layer, name][places] = kept.to(dtype).cpu()

    def of_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Returns the tables of a layer by their names."""
        return {name: self._tables[layer, name] for name in SAMPLES} | {MARKS: self.marks.clone()}
