"""Models of a known shape with random weights, as speed depends on shapes and not on weights."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.formats.layer_quantizer import LayerTables
from kvquant.formats.rope import rotate
from kvquant.models.loading import QuantizedModel, install_attention
from kvquant.quantization.ranged_tables import ranged_tables
from kvquant.schemes.registry import ModelShape, build_caches, build_codecs
from kvquant.study.kernels import SHAPES
from kvquant.study.scheme_kinds import CalibratedScheme
from kvquant.study.schemes import SchemeSpec

SAMPLE = 1024  # tokens from which key ranges are taken
POSITIONS = 1 << 20  # more than any case has, so that RoPE is not scaled


def head_dim(shape: str) -> int:
    """Returns the number of channels per head."""
    return SHAPES[shape]["hidden_size"] // SHAPES[shape]["num_attention_heads"]


class RandomModel:
    """A Llama with random weights, in fp16 on a GPU and fp32 on a CPU.

    Args:
        shape: Name in :data:`kvquant.study.kernels.SHAPES`.
        device: Device of the weights.
        layers: Number of layers; None takes the shape's.
    """

    def __init__(self, shape: str, device: torch.device, layers: int | None = None) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.shape, self.device = shape, device
        self.dims = {**SHAPES[shape]}
        self.dims["num_hidden_layers"] = layers or self.dims["num_hidden_layers"]
        config = LlamaConfig(
            **self.dims, max_position_embeddings=POSITIONS, attn_implementation="sdpa"
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16 if device.type == "cuda" else torch.float32)
        try:
            with torch.device(device):
                self.model: Any = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        self.model.requires_grad_(False)
        install_attention(self.model)
        self._keys: list[torch.Tensor] | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.dims["num_hidden_layers"]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(int(p.nbytes) for p in self.model.parameters())

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
            self._keys = seen
        return self._keys

    def _roped(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns keys `[tokens, num_kv_heads * head_dim]` of a sequence after RoPE."""
        positions = torch.arange(len(keys), device=keys.device)[None]
        by_head = keys.unflatten(1, (-1, head_dim(self.shape))).transpose(0, 1)[None]
        turned = rotate(by_head, *self.model.model.rotary_emb(by_head, positions))
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

    def with_scheme(self, scheme: SchemeSpec) -> QuantizedModel:
        """Returns the model with caches of a scheme.

        Raises:
            UserError: The scheme cannot serve this shape, or a package is missing.
        """
        size = self.dims["num_key_value_heads"], head_dim(self.shape)
        tables = self.tables(scheme)
        caches = build_caches(scheme, ModelShape(self.layers, *size), tables)
        codecs = build_codecs(scheme, self.layers, tables)
        for codec in codecs or []:
            codec.check_model(*size)
            if codec.rotates_values:  # folded in, as random weights stay random when rotated
                codec.expect_rotated_values()
        return QuantizedModel(self.model, None, scheme, codecs, caches)
