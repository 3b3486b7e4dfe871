"""Transformers' own quantized caches behind our interface: `hf-quanto`, `hf-hqq`, `hf-fp8`.

The layers are those of transformers (`QuantoQuantizedLayer`, `HQQQuantizedLayer`,
`Fp8QuantizedLayer`) and behave as in `QuantizedCache`. The model keeps its own attention, and keys
are stored after RoPE. For a measurement this means:

- The first call returns the full-precision states, so a perplexity by one forward pass measures
  nothing. Only protocol A, in chunks, is offered.
- Padding is stored, quantized and counted as memory. Groups may run across sequences, so what a
  sequence gets back may depend on its batch.
- Integer layers keep later tokens in 16 bits up to `residual`, then dequantize the whole cache and
  quantize it again. Every call dequantizes the whole cache.

This module adds what the layers lack. It rounds the states of an fp32 model to fp16, as the library
does for all 16-bit tensors. It counts bytes and measures the time of quantization. It selects
sequences, which the integer layers of transformers 5.17 cannot do.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, QuantizedLayer

from kvquant.cache.interface import CountedCache, NotCut, QuantizeClock
from kvquant.errors import MissingPackage, UserError
from kvquant.schemes import quanto_extension
from kvquant.schemes.registry import CacheFactory, ModelShape, Tables
from kvquant.study.schemes import HfFp8Scheme, HfHqqScheme, HfQuantoScheme

HfScheme = HfQuantoScheme | HfHqqScheme | HfFp8Scheme
_BACKENDS = {
    "hf-quanto": ("QuantoQuantizedLayer", "optimum.quanto", "optimum-quanto"),
    "hf-hqq": ("HQQQuantizedLayer", "hqq", "hqq"),
    "hf-fp8": ("Fp8QuantizedLayer", None, None),
}


def tensor_bytes(found: Any) -> int:
    """Returns the bytes of all tensors in nested containers and in quanto's tensor subclasses."""
    if isinstance(found, torch.Tensor):
        if hasattr(found, "__tensor_flatten__"):
            return sum(tensor_bytes(getattr(found, name)) for name in found.__tensor_flatten__()[0])
        return found.nbytes
    if isinstance(found, dict):
        return sum(tensor_bytes(x) for x in found.values())
    if isinstance(found, list | tuple):
        return sum(tensor_bytes(x) for x in found)
    return 0


class _PeerLayer:
    """Adds counting, timing and selection to a layer class of transformers, as a mixin."""

    clock: QuantizeClock
    is_croppable = False
    _rows: torch.Tensor | None = None  # which sequences are read from the quantized states
    _shape: tuple[int, int, int] | None = None  # batch_size, kv_heads, head_dim

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values in 16 bits and returns all, as transformers' layer does."""
        kind = key_states.dtype
        batch, heads, _, dim = key_states.shape
        self._shape = (batch, heads, dim)
        if kind is torch.float32:
            key_states, value_states = key_states.half(), value_states.half()
        parent: Any = super()
        keys, values = parent.update(key_states, value_states, *args, **kwargs)
        return keys.to(kind), values.to(kind)

    def _quantize(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._rows = None  # `_dequantize` has applied the selection to this tensor already
        parent: Any = super()
        with self.clock.measure(tensor.device):
            return parent._quantize(tensor, *args, **kwargs)

    def _dequantize(self, held: Any) -> torch.Tensor:
        parent: Any = super()
        out: torch.Tensor = parent._dequantize(held)
        return out if self._rows is None else out.index_select(0, self._rows.to(out.device))

    def choose(self, indices: torch.Tensor) -> None:
        """Keeps, repeats or reorders sequences.

        The selection is applied to quantized states when they are read next.
        """
        me: Any = self
        if not me.is_initialized:
            return
        if not isinstance(self, QuantizedLayer):
            me.reorder_cache(indices)
            return
        indices = indices.to(me.device)
        self._rows = indices.clone() if self._rows is None else self._rows[indices]
        if me.keys.numel():
            me.keys, me.values = (
                me.keys.index_select(0, indices),
                me.values.index_select(0, indices),
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to remove tokens, because quantized states cannot be cut."""
        raise NotCut("a quantized cache of transformers")

    @property
    def nbytes(self) -> int:
        """Returns the bytes that the layer has allocated."""
        me: Any = self
        names = ("_quantized_keys", "_quantized_values", "keys", "values")
        return sum(tensor_bytes(getattr(me, name, None)) for name in names)


@functools.cache
def _layer_class(name: str) -> Any:
    return type(f"Peer{name}", (_PeerLayer, getattr(cache_utils, name)), {})


class HfQuantizedCache(Cache, QuantizeClock, CountedCache):
    """A cache made of transformers' quantized layers (see the module)."""

    def __init__(self, spec: HfScheme, num_layers: int) -> None:
        QuantizeClock.__init__(self)
        if spec.kind == "hf-quanto" and torch.cuda.is_available():
            quanto_extension.build()
        made = _layer_class(_BACKENDS[spec.kind][0])
        layers = [made(**_options(spec)) for _ in range(num_layers)]
        for layer in layers:
            layer.clock = self
        Cache.__init__(self, layers=layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> HfQuantizedCache:
        """Returns an independent copy that shares the states, which are never written in place."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.layers:
            layer.clock = other
        return other

    def _choose(self, indices: torch.Tensor) -> None:
        for layer in self.layers:
            layer.choose(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences, as beam search needs."""
        self._choose(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the given sequences, named by int64 indices or a bool mask."""
        self._choose(indices.nonzero().view(-1) if indices.dtype is torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence the given number of times."""
        shape = self.layers[0]._shape
        if shape is not None:
            self._choose(torch.arange(shape[0]).repeat_interleave(repeats))

    def stored_nbytes(self) -> int:
        """Returns the bytes that all layers have allocated, padding included."""
        return sum(layer.nbytes for layer in self.layers)

    def stored_elements(self, mask: torch.Tensor | None) -> int:
        """Returns the number of key and value elements of real tokens, without padding."""
        total = 0
        for layer in self.layers:
            if layer._shape is not None:
                batch, heads, dim = layer._shape
                tokens = batch * layer.get_seq_length() if mask is None else int(mask.sum())
                total += 2 * heads * dim * tokens
        return total


def _options(spec: HfScheme) -> dict[str, int]:
    if isinstance(spec, HfFp8Scheme):
        return {}
    axis = spec.axis if isinstance(spec, HfHqqScheme) else 0
    return {
        "nbits": spec.bits,
        "axis_key": axis,
        "axis_value": axis,
        "q_group_size": spec.group,
        "residual_length": spec.residual,
    }


def check(spec: HfScheme, num_kv_heads: int, head_dim: int) -> None:
    """Refuses a scheme that this installation or model cannot run.

    Raises:
        MissingPackage: A package is missing; the message names it.
        UserError: An option does not fit the model; the message names it and the fix.
    """
    layer, module, package = _BACKENDS[spec.kind]
    if not hasattr(cache_utils, layer):
        raise MissingPackage(
            f"scheme kind '{spec.kind}': this transformers has no {layer}; install a newer release "
            "or use kind 'fp8'"
        )
    if module is not None and not _installed(module):
        raise MissingPackage(
            f"scheme kind '{spec.kind}' needs the package {package}: pip install {package}, or "
            "install kvquant with its extra 'peers'"
        )
    if isinstance(spec, HfFp8Scheme):
        return
    rows, left = divmod(num_kv_heads * head_dim, spec.group)
    if left:
        raise UserError(
            f"group: {spec.group} does not divide the {num_kv_heads} x {head_dim} elements of a "
            "token; choose a divisor"
        )
    if isinstance(spec, HfHqqScheme) and spec.axis == 1 and rows * spec.bits % 8:
        raise UserError(
            f"axis: HQQ packs {8 // spec.bits} groups together along axis 1, a token has {rows}; "
            "use axis 0 or smaller groups"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def make_caches(spec: HfScheme, shape: ModelShape, tables: Tables) -> CacheFactory:
    """Returns a function that makes empty caches, after :func:`check` accepted the scheme."""
    check(spec, shape.num_kv_heads, shape.head_dim)
    return lambda protocol, rope: HfQuantizedCache(spec, shape.num_layers)
