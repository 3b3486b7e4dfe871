"""The hooks that add what a calibration window shows of keys, values and queries to histograms.

Key ranges are static per channel, but known only at the end. The histogram of each channel is
therefore kept in raw units. The first window defines its grid, which doubles when later data leaves
it. Percentiles come from the counts, and the normalized histogram for any range is an affine map of
the bins. Values are normalized online per token, so their histograms hold normalized data, with one
histogram for each outlier fraction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kvquant.calibration.key_histograms import RopedKeys
from kvquant.calibration.statistics import LayerStatistics, head_moments
from kvquant.calibration.token_sample import TokenSample
from kvquant.errors import NonFinite, UserError
from kvquant.formats.rope import rotate
from kvquant.models.adapters import Part
from kvquant.models.finite import remedy
from kvquant.models.layer_kinds import layer_kinds
from kvquant.models.loading import attention_layers
from kvquant.models.prefill_quant import adapter_of
from kvquant.models.rotary import rotary_width
from kvquant.study.calibration import CalibrationSpec

# Called after each window with its number, from 1 on, the number of windows, and its loss.
Report = Callable[[int, int, float], None]
HEADROOM = 4  # powers of two by which gradients are smaller than those of a sum over tokens


def loss_scale(tokens: int) -> int:
    """Returns the factor of a window's loss in the backward pass, a power of two.

    Gradients of the mean loss shrink with the window and are below the range of fp16, which
    distorts the squares of small ones many times over. Those of a sum over tokens are not, but
    come closer to its largest number in larger models; a sixteenth of them is far from both ends
    (SmolLM2-135M, 384 tokens: Fisher weights within 11 % of fp32's, without a factor within 125 %).
    By a power of two the gradients of other dtypes are the same to the last bit.
    """
    return 1 << max(0, tokens.bit_length() - 1 - HEADROOM)


class Collector:
    """Collects statistics by hooks on the key and value projections of every layer."""

    def __init__(
        self,
        model: Any,
        spec: CalibrationSpec,
        sample: TokenSample | None,
        roped_keys: RopedKeys | None,
    ) -> None:
        self.spec = spec
        self._sample, self._roped_keys = sample, roped_keys
        self._number = 0  # of the current window
        every, kinds = attention_layers(model), layer_kinds(model.model)
        if not kinds.full:
            raise UserError(
                f"model: all layers have a sliding window (sliding_window: {kinds.window}), which "
                "caches keep in 16 bits: there is nothing to calibrate"
            )
        self._numbers = kinds.full  # of the layers that see all tokens, the only calibrated ones
        self.layers = [every[i] for i in kinds.full]
        self._width = rotary_width(model, kinds.full_rope)
        self.heads = int(model.config.num_key_value_heads)
        self.statistics: list[LayerStatistics | None] = [None] * len(self.layers)
        self._late: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Cosine and sine of the current window's positions; moments by layer and name of the table.
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None
        self._roped: dict[tuple[int, str], torch.Tensor] = {}
        # Maps names of the current window's tensors to whether they are finite, on the device.
        self._finite: dict[str, torch.Tensor] = {}
        self.handles = []
        for i, module in enumerate(self.layers):
            adapter = adapter_of(module)
            queries = adapter.part(module, "queries")
            keys, values = adapter.part(module, "keys"), adapter.part(module, "values")
            for part in (keys, values):
                self.handles.append(part.module.register_forward_hook(self._hook(i, part)))
            for name, part in (("roped_key_moments", keys), ("roped_query_moments", queries)):
                hook = self._add_roped(i, name, part)
                self.handles.append(part.module.register_forward_hook(hook))
            self.handles.append(module.register_forward_pre_hook(self._see_rope, with_kwargs=True))

    def _hook(self, layer: int, part: Part) -> Any:
        is_key, width = part.pairs, self._width

        def forward_hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.requires_grad_()  # the graph starts here, as weights are frozen
            data = part.read(output.detach(), width)
            name = f"layer {self._numbers[layer]}: {'keys' if is_key else 'values'}"
            # Values are quantized from fp16, in which they must be finite, too.
            self._finite[name] = (data if is_key else data.half()).isfinite().all()
            rope = self._rope

            def receive(grad: torch.Tensor) -> None:
                self._receive(layer, is_key, data, part.read(grad, width), rope)

            output.register_hook(receive)
            return output

        return forward_hook

    def _see_rope(self, module: Any, args: Any, kwargs: Any) -> None:
        table = kwargs["position_embeddings"]
        cos, sin = adapter_of(module).table(table, int(module.head_dim))
        if not adapter_of(module).rotates(module):
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        device = next(module.parameters()).device  # accelerate's own hook moves the table later
        self._rope = cos.float().to(device), sin.float().to(device)

    def _add_roped(self, layer: int, name: str, part: Part) -> Any:
        """Returns a hook that finds the moments after RoPE of what a module gives."""
        dim, width = int(self.layers[layer].head_dim), self._width
        adapter = adapter_of(self.layers[layer])

        @torch.no_grad()
        def forward_hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            assert self._rope is not None
            x = part.read(output, width).float().unflatten(2, (-1, dim)).transpose(1, 2)
            turned = rotate(x, *self._rope)
            if name == "roped_query_moments":
                positions = torch.arange(x.shape[2], device=x.device)[None]
                factor = adapter.query_factor(self.layers[layer], positions)
                turned = turned if factor is None else turned * factor
            seen = turned[0, :, self.spec.sinks :]
            # Where it is infinite, the loss will be, too.
            self._roped[layer, name] = head_moments(seen, self.heads)

        return forward_hook

    @torch.no_grad()
    def _receive(
        self,
        layer: int,
        is_key: bool,
        data: torch.Tensor,
        grad: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        name = f"layer {self._numbers[layer]}: gradients of the {'keys' if is_key else 'values'}"
        self._finite[name] = grad.isfinite().all()
        skip = self.spec.sinks
        # The loss is a mean over the window's tokens; undo it so that tokens weigh equally.
        tokens = data.shape[1]
        factor = tokens / loss_scale(tokens)
        x = data[0, skip:].reshape(tokens - skip, -1).float()
        gradient = grad[0, skip:].reshape(tokens - skip, -1).float() * factor
        if self._sample is not None:
            kind = "key" if is_key else "value"
            self._sample.add(self._number, layer, f"{kind}_sample", data[0].flatten(1))
            slopes = grad[0].flatten(1).float() * factor
            self._sample.add(self._number, layer, f"{kind}_gradient_sample", slopes)
        if self.statistics[layer] is None and is_key:
            self.statistics[layer] = LayerStatistics.from_first(
                x, self.spec.bins, len(self.spec.outlier_fractions), self.heads
            )
        statistics = self.statistics[layer]
        if is_key:
            assert statistics is not None
            statistics.add_keys(x, gradient**2)
            statistics.add_moments(x, gradient, keys=True)
            if self._roped_keys is not None:
                assert rope is not None
                slopes = grad[0].flatten(1).float() * factor
                self._roped_keys.add(layer, data[0].flatten(1), slopes, rope)
        elif statistics is None:
            self._late[layer] = (x, gradient)  # in the first window, keys arrive after values
        else:
            self._add_values(statistics, x, gradient)

    def _add_values(
        self, statistics: LayerStatistics, x: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        statistics.add_values(x, gradient**2, self.spec.outlier_fractions)
        statistics.add_moments(x, gradient, keys=False)
        statistics.add_rotated(x, gradient)

    def run(
        self, model: Any, windows: list[list[int]], device: torch.device, report: Report
    ) -> None:
        """Runs one forward and one backward pass per window.

        Raises:
            NonFinite: A window's loss, activations or gradients are NaN or infinite.
        """
        try:
            for number, window in enumerate(windows):
                where = f"window {number + 1}/{len(windows)}"
                self._number = number
                loss = self._window(model, torch.tensor([window], device=device), where)
                report(number + 1, len(windows), loss)
        finally:
            for handle in self.handles:
                handle.remove()

    def _window(self, model: Any, ids: torch.Tensor, where: str) -> float:
        """Adds the statistics of one window and returns its loss."""
        self._late, self._roped, self._finite = {}, {}, {}
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            # Check before the backward pass, which adds its gradients to the statistics.
            self._finite["the loss"] = loss.isfinite().all()
            self._check(model, where)
            (loss * loss_scale(ids.shape[1])).backward()
        self._check(model, where)
        for layer, (x, gradient) in self._late.items():
            statistics = self.statistics[layer]
            assert statistics is not None
            self._add_values(statistics, x, gradient)
        for (layer, name), moments in self._roped.items():
            getattr(self.statistics[layer], name).add_(moments)
        return float(loss.item())

    def _check(self, model: Any, where: str) -> None:
        """Checks with one host sync that all tensors of a pass were finite."""
        flags = list(self._finite.values())
        device = flags[0].device  # the layers may be on several
        finite = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).tolist()
        if not all(finite):
            what = list(self._finite)[finite.index(False)]
            dtype = next(model.parameters()).dtype
            raise NonFinite(f"calibration: {where}: {what}: not finite: {remedy(dtype)}")
        self._finite.clear()
