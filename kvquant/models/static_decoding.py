"""Runs decode steps over a static 16-bit cache as one CUDA graph.

It is the baseline at its best: the fp16 cache decoded as fast as quantized ones are
(:mod:`kvquant.models.graph_decoding`). A graph needs tensors of one size, so that a step attends to
the whole allocation with a mask of what is written. Which of torch's attention kernels is fastest
there depends on the shape, and is measured before the capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from kvquant.energy.gpus import devices_of
from kvquant.models.capturing import capture
from kvquant.models.layer_kinds import layer_kinds
from kvquant.models.model_call import cache_argument
from kvquant.models.tensor_parallel import is_shared
from kvquant.schemes.fp16_static import StaticFp16Cache

NAME = "kvquant-fixed"  # the attention of a step, as transformers knows it
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
TIMED_CALLS = 5


def fixed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes the attention of one token per sequence in the signature of transformers.

    The query heads of a kv head become rows of one query, so that keys and values are read once and
    need not be repeated.

    Args:
        module: The attention module; unused.
        query: `[batch_size, num_heads, 1, head_dim]`.
        key: `[batch_size, num_kv_heads, columns, head_dim]`.
        value: The same shape.
        attention_mask: bool `[batch_size, 1, 1, columns]`.
        scaling: Factor of the scores; None: one over the root of `head_dim`.
        kwargs: What transformers passes beside; unused.

    Returns:
        `[batch_size, 1, num_heads, head_dim]`, and None for the weights.
    """
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    mask = None
    if attention_mask is not None:
        mask = attention_mask.expand(batch, 1, heads // kv_heads, -1)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scaling
    )
    return out.reshape(batch, 1, heads, dim), None


class FixedLayer(CacheLayerMixin):
    """A layer that writes at a column known on the device and returns its whole allocation.

    Args:
        keys: `[batch_size, num_kv_heads, columns, head_dim]`.
        values: The same shape.
        column: int64 `[1]`, where the next token goes.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column = keys, values, column
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing, as the layer is filled from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one token per sequence and returns all columns, unwritten ones included."""
        keys: Any = self.keys
        values: Any = self.values
        keys.index_copy_(2, self._column, key_states.to(keys.dtype))
        values.index_copy_(2, self._column, value_states.to(values.dtype))
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Returns the number of columns and the first of them."""
        keys: Any = self.keys
        return keys.shape[2], 0

    def get_seq_length(self, *args: Any) -> int:
        """Returns 0: the host does not know how many columns are written."""
        return 0

    def get_max_length(self) -> int:
        """Returns the number of columns."""
        keys: Any = self.keys
        return int(keys.shape[2])

    get_max_cache_shape = get_max_length  # its name in older releases


def fastest_backend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> SDPBackend:
    """Returns torch's fastest attention kernel for a step of this shape, measured on the device.

    Raises:
        RuntimeError: None of the kernels takes the shape.
    """
    found: dict[SDPBackend, float] = {}
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                fixed_attention(None, query, keys, values, mask)
                torch.cuda.synchronize(query.device)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(TIMED_CALLS):
                    fixed_attention(None, query, keys, values, mask)
                end.record()
                torch.cuda.synchronize(query.device)
        except torch.cuda.OutOfMemoryError:
            continue
        except RuntimeError as error:  # "No available kernel"
            if "kernel" not in str(error).lower():
                raise
            continue
        found[backend] = begin.elapsed_time(end)
    if not found:
        raise RuntimeError("attention: no kernel of torch takes this shape with a mask")
    return min(found, key=lambda backend: found[backend])


class StaticDecoder:
    """Decodes one token per sequence and step over a static 16-bit cache that holds the prompts.

    On a GPU the steps are a CUDA graph; on a CPU they call the model in the same way.

    Args:
        model: The model.
        cache: The cache after the prefill. It must not be used elsewhere afterwards.
        mask: `[batch_size, columns]`, 1 = token, 0 = padding on the left.
        new_tokens: Number of steps for which to make room.

    Attributes:
        backend: The attention kernel that was fastest; None on a CPU.

    Raises:
        ValueError: The model is on several devices or shared by processes, or the mask is not that
            of the cache.
    """

    @torch.inference_mode()  # so are the buffers, whatever mode the caller is in
    def __init__(
        self, model: Any, cache: StaticFp16Cache, mask: torch.Tensor, new_tokens: int
    ) -> None:
        if is_shared(model):
            raise ValueError("model: processes share its heads (tp_plan); call the model instead")
        devices = devices_of(model.parameters())
        if len(devices) > 1:
            raise ValueError("model: a graph holds the work of one GPU; call the model instead")
        if new_tokens < 1:
            raise ValueError(f"new_tokens: must be at least 1, got {new_tokens}")
        first = cache.layers[0].keys
        held = (0, 0) if first is None else (first.shape[0], first.shape[2])
        if tuple(mask.shape) != held or not held[1]:
            raise ValueError(f"mask: has shape {tuple(mask.shape)}, but the cache holds {held}")
        device = devices[0]
        self._model, self._steps = model, new_tokens
        batch, columns = mask.shape
        kinds = layer_kinds(model.model)
        if kinds.soft_cap is not None:
            raise ValueError(
                f"model: caps its scores (attn_logit_softcapping: {kinds.soft_cap}), which these "
                "steps do not; call the model instead"
            )
        if kinds.sinks:
            raise ValueError(
                "model: has attention sinks (the learned parameter 'sinks'), which these steps "
                "leave out; call the model instead"
            )
        found = (kinds.window, kinds.unreached)
        window = min((window for window in found if window is not None), default=None)
        if window is not None and columns + new_tokens > window:
            raise ValueError(
                f"new_tokens: {columns + new_tokens} columns exceed the model's sliding window "
                f"(sliding_window: {window}), which these steps do not know; make fewer steps"
            )
        cache.reserve(new_tokens)
        buffers = [layer.allocation for layer in cache.layers]
        for buffer in (x for pair in buffers for x in pair):
            buffer[:, :, columns:].zero_()  # a weight of 0 times NaN would be NaN
        keys, values = buffers[0]
        self._column = torch.tensor([columns], device=device)
        self._cache = Cache(layers=[FixedLayer(k, v, self._column) for k, v in buffers])
        self._mask = torch.zeros((batch, 1, 1, keys.shape[2]), dtype=torch.bool, device=device)
        self._mask[:, 0, 0, :columns] = mask.bool()
        self._tokens = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self._positions = mask.sum(1, keepdim=True).to(device)
        AttentionInterface.register(NAME, fixed_attention)
        self.backend: SDPBackend | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None
        if device.type == "cuda":
            heads = int(model.config.num_attention_heads)
            query = keys.new_zeros((batch, heads, 1, keys.shape[3]))
            self.backend = fastest_backend(query, keys, values, self._mask)
            self._capture()

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Lets the model attend by :func:`fixed_attention`."""
        config = self._model.config
        usual = config._attn_implementation
        config._attn_implementation = NAME
        try:
            with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
                yield
        finally:
            config._attn_implementation = usual

    def _work(self) -> torch.Tensor:
        self._mask.index_fill_(3, self._column, True)
        output = self._model(
            input_ids=self._tokens,
            attention_mask=self._mask,
            position_ids=self._positions,
            **cache_argument(self._model, self._cache),
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        self._column += 1
        self._positions += 1
        return logits

    @torch.inference_mode()
    def _capture(self) -> None:
        """Captures a step after a warm-up step; what both wrote is written anew later."""
        kept = [(x, x.clone()) for x in (self._column, self._positions, self._mask)]

        def undo() -> None:
            for now, before in kept:
                now.copy_(before)

        with self._attention(), torch.cuda.device_of(self._tokens):
            self._graph, self._logits = capture(self._work, undo)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decodes one token per sequence.

        Args:
            tokens: int64 `[batch_size, 1]`, the next token of each sequence.

        Returns:
            Logits `[batch_size, vocab_size]`; those of a graph are overwritten by the next step.

        Raises:
            ValueError: All steps for which there is room were made.
        """
        if not self._steps:
            raise ValueError("new_tokens: all steps were made; make room for more")
        self._steps -= 1
        self._tokens.copy_(tokens)
        if self._graph is None or self._logits is None:
            with self._attention():
                return self._work()
        with torch.cuda.device_of(self._tokens):
            self._graph.replay()
        return self._logits
