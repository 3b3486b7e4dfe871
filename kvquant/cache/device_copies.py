"""Copies what a call shares among its layers to another device, where some of the layers are.

A model may be spread over several GPUs, layer by layer. Each layer's tokens lie on the layer's own
device, and so must the positions, masks and tables that it reads.
"""

from __future__ import annotations

import torch

from kvquant.cache.kept_rope import Table
from kvquant.cache.layout import Span


class DeviceCopies:
    """Copies tensors to one device, each of them once; the host does not wait.

    Args:
        device: The device of the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By identity, with the tensor itself, whose number would else be given out again.
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the copy of a tensor, the same one each time."""
        found = self._copies.get(id(tensor))
        if found is None:
            found = tensor, tensor.to(self._device, non_blocking=True)
            self._copies[id(tensor)] = found
        return found[1]

    def of_any(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the copy of a tensor, or None for None."""
        return None if tensor is None else self.of(tensor)

    def of_table(self, table: Table | None) -> Table | None:
        """Returns the copy of a rotary table, or None for None."""
        return None if table is None else (self.of(table[0]), self.of(table[1]))

    def of_spans(self, spans: list[Span]) -> list[Span]:
        """Returns the columns of each sequence that are tokens."""
        return [span if isinstance(span, slice) else self.of(span) for span in spans]
