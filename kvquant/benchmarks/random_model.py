"""Models of a known shape with random weights, as speed depends on shapes and not on weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kvquant.benchmarks.random_shards import shared_llama, stand_in
from kvquant.cache.capacity_formula import tokens_that_fit
from kvquant.formats.head_share import HeadShare
from kvquant.formats.layer_quantizer import LayerTables
from kvquant.formats.rope import rotate
from kvquant.models.loading import QuantizedModel, install_attention
from kvquant.models.placement import even_map, layer_devices, spread
from kvquant.models.tensor_parallel import own_tensor
from kvquant.quantization.ranged_tables import ranged_tables
from kvquant.schemes.registry import ModelShape, build_caches, build_codecs
from kvquant.study.jobs import Split
from kvquant.study.kernels import SHAPES
from kvquant.study.scheme_kinds import CalibratedScheme
from kvquant.study.schemes import SchemeSpec

SAMPLE = 1024  # tokens from which key ranges are taken
POSITIONS = 1 << 20  # more than any case has, so that RoPE is not scaled


def head_dim(shape: str) -> int:
    """Returns the number of channels per head."""
    return SHAPES[shape]["hidden_size"] // SHAPES[shape]["num_attention_heads"]


@torch.no_grad()
def _filled(model: Any, devices: Sequence[torch.device]) -> Any:
    """Fills a model of the meta device with random weights, each where it stays.

    No GPU and no host memory ever holds the whole model.
    """
    places = even_map(model, devices)
    for name, module in model.named_modules():
        where = next((d for p, d in places.items() if f"{name}.".startswith(f"{p}.")), devices[0])
        for key, meta in module.named_parameters(recurse=False):
            made = torch.empty_like(meta, device=where)
            if made.dim() > 1:
                made.normal_(0.0, model.config.initializer_range)
            else:
                made.fill_(1.0)  # a norm
            setattr(module, key, nn.Parameter(made, requires_grad=False))
    rotary = model.model.rotary_emb  # its tables are no weights
    with devices[0]:
        model.model.rotary_emb = type(rotary)(model.config)
    return spread(model, devices)


class RandomModel:
    """A Llama with random weights, in fp16 on a GPU and fp32 on a CPU.

    Args:
        shape: Name in :data:`kvquant.study.kernels.SHAPES`.
        device: Device of the weights, or several GPUs, over which the layers are spread evenly by
            bytes.
        layers: Number of layers; None takes the shape's.
        split: "heads": the processes that were started together share the model; `device` is this
            one's.

    Attributes:
        share: Which of the kv heads this process has; None: all.
    """

    def __init__(
        self,
        shape: str,
        device: torch.device | Sequence[torch.device],
        layers: int | None = None,
        *,
        split: Split = "layers",
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        devices = [device] if isinstance(device, torch.device) else list(device)
        dims = {**SHAPES[shape]}
        dims["num_hidden_layers"] = layers or dims["num_hidden_layers"]
        config = LlamaConfig(**dims, max_position_embeddings=POSITIONS, attn_implementation="sdpa")
        dtype = torch.float16 if devices[0].type == "cuda" else torch.float32
        torch.manual_seed(0)
        if split == "heads":
            model, share = shared_llama(config, dtype)
            torch.manual_seed(0)  # all processes draw the same tokens afterwards
            self._take(model, shape, devices, dims, share)
            return
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        alone = len(devices) == 1
        try:
            with torch.device(devices[0] if alone else "meta"):
                model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        self._take(model if alone else _filled(model, devices), shape, devices, dims)

    def _take(
        self,
        model: Any,
        shape: str,
        devices: list[torch.device],
        dims: dict[str, int],
        share: HeadShare | None = None,
    ) -> None:
        """Takes a model of random weights and prepares its attention."""
        self.model, self.shape, self.devices, self.dims = model, shape, devices, dims
        self.device, self.share = devices[0], share
        self.model.requires_grad_(False)
        install_attention(self.model)
        self._keys: list[torch.Tensor] | None = None

    def part_alone(self) -> RandomModel:
        """Returns this process's part as a model that talks to no other (:func:`stand_in`)."""
        made = object.__new__(RandomModel)
        model, dims = stand_in(self.model, self.dims, head_dim(self.shape))
        made._take(model, self.shape, self.devices, dims)
        return made

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.dims["num_hidden_layers"]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that this process has."""
        return sum(int(own_tensor(p).nbytes) for p in self.model.parameters())

    def bytes_on(self, device: torch.device) -> int:
        """Returns the bytes of the weights on one device."""
        every = self.model.parameters()
        return sum(int(own_tensor(p).nbytes) for p in every if p.device == device)

    def layers_on(self, device: torch.device) -> list[int]:
        """Returns the numbers of the layers on one device."""
        return [i for i, where in enumerate(layer_devices(self.model)) if where == device]

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that a decode step reads, all but the input embeddings."""
        embedding = self.model.model.embed_tokens.weight
        return sum(p.nbytes for p in self.model.parameters()) - int(embedding.nbytes)

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        """Returns random token ids, int64 `[batch_size, tokens]`."""
        return torch.randint(0, self.dims["vocab_size"], (batch, tokens), device=self.device)

    @torch.inference_mode()
    def _sample(self) -> list[torch.Tensor]:
        """Returns keys before RoPE of a sample, `[tokens, num_kv_heads * head_dim]` per layer."""
        if self._keys is None:
            seen: list[torch.Tensor] = []
            hooks = [
                layer.self_attn.k_proj.register_forward_hook(
                    lambda module, inputs, output: seen.append(output[0])
                )
                for layer in self.model.model.layers
            ]
            self.model(input_ids=self.ids(1, SAMPLE), logits_to_keep=1)
            for hook in hooks:
                hook.remove()
            self._keys = seen if self.share is None else list(map(self.share.gathered, seen))
        return self._keys

    def _roped(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns keys `[tokens, num_kv_heads * head_dim]` of a sequence after RoPE."""
        positions = torch.arange(len(keys), device=keys.device)[None]
        by_head = keys.unflatten(1, (-1, head_dim(self.shape))).transpose(0, 1)[None]
        table = self.model.model.rotary_emb(by_head, positions)
        turned = rotate(by_head, *(part.to(keys.device) for part in table))
        return turned[0].transpose(0, 1).flatten(1)

    def tables(self, scheme: SchemeSpec) -> list[LayerTables] | None:
        """Returns tables per layer for a calibrated scheme, whose ranges leave its outliers out."""
        if not isinstance(scheme, CalibratedScheme):
            return None
        size = self.dims["num_key_value_heads"], head_dim(self.shape)
        outliers = getattr(scheme, "outliers", 0.0)
        ends = outliers / 2, 1 - outliers / 2
        found: list[LayerTables] = []
        for keys in self._sample():
            if scheme.keys_after_rope:
                keys = self._roped(keys)
            low, high = (torch.quantile(keys.float(), q, dim=0).view(size) for q in ends)
            found.append(ranged_tables(scheme, (low + high) / 2, (high - low) / 2))
        return found

    @property
    def own_kv_heads(self) -> int:
        """Number of kv heads of this process."""
        return self.dims["num_key_value_heads"] if self.share is None else self.share.count

    def tokens_that_fit(
        self, scheme: SchemeSpec, prompt: int, allowed: Mapping[torch.device, int]
    ) -> int | None:
        """Returns how many tokens of prompts of one length fit by the cache's bytes per token.

        The GPU that is full first decides. None for a kind of scheme without a formula.

        Args:
            scheme: The scheme.
            prompt: Tokens of each prompt.
            allowed: Bytes of each device, weights included.
        """
        tables, found = self.tables(scheme), []
        if tables is not None and self.share is not None:
            tables = [table.of_heads(self.share.own) for table in tables]
        for device, memory in allowed.items():
            layers = self.layers_on(device)
            shape = (len(layers), self.own_kv_heads, head_dim(self.shape))
            own = None if tables is None else [tables[i] for i in layers]
            free = memory - self.bytes_on(device)
            found.append(tokens_that_fit(scheme, own, shape, prompt, free))
        known = [tokens for tokens in found if tokens is not None]
        return min(known) if len(known) == len(found) else None

    def with_scheme(self, scheme: SchemeSpec) -> QuantizedModel:
        """Returns the model with caches of a scheme.

        Raises:
            UserError: The scheme cannot serve this shape or share its heads, or a package is
                missing.
        """
        size = self.own_kv_heads, head_dim(self.shape)
        tables = self.tables(scheme)
        codecs = build_codecs(scheme, self.layers, tables, self.share)
        caches = build_caches(scheme, ModelShape(self.layers, *size), tables)
        for codec in codecs or []:
            codec.check_model(*size)
            if codec.rotates_values:  # folded in, as random weights stay random when rotated
                codec.expect_rotated_values()
        return QuantizedModel(self.model, None, scheme, codecs, caches, share=self.share)
