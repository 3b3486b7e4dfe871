"""From a scheme's entry in the study to the codecs of its layers, or to caches of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvquant.cache.codec import Codec
from kvquant.errors import UserError, unknown
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.rope import Rope
from kvquant.schemes import hf_quantized
from kvquant.schemes.fp8 import Fp8Codec
from kvquant.schemes.fp16_static import StaticFp16Cache
from kvquant.schemes.int4_hadamard import Int4HadamardCodec
from kvquant.schemes.kivi import KiviCodec
from kvquant.schemes.kvquant_ref import ReferenceCache
from kvquant.schemes.kvquant_store import ReferenceTables
from kvquant.schemes.nuq import NuqCodec
from kvquant.schemes.turboquant import TurboQuantCodec

Tables = list[LayerQuantizer] | None
CacheFactory = Callable[[Any, Rope], Any]  # (protocol, rotary table) -> an empty cache


@dataclass(frozen=True)
class ModelShape:
    """What a cache must know of its model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def _tables(kind: str, tables: Tables) -> list[LayerQuantizer]:
    if tables is None:
        raise UserError(f"quantizer: scheme kind '{kind}' needs a quantizer file (run `quantize`)")
    return tables


# Schemes that pack blocks of tokens: a codec a layer, in a KVQuantCache.
CODECS: dict[str, Callable[[Any, int, Tables], Codec]] = {
    "nuq": lambda spec, layer, tables: NuqCodec(spec, _tables("nuq", tables)[layer]),
    "kivi": lambda spec, layer, tables: KiviCodec(spec),
    "fp8": lambda spec, layer, tables: Fp8Codec(spec),
    "turboquant": lambda spec, layer, tables: TurboQuantCodec(spec, layer),
    "int4-hadamard": lambda spec, layer, tables: Int4HadamardCodec(spec),
}


def _hf(spec: Any, shape: ModelShape, tables: Tables) -> CacheFactory:
    hf_quantized.check(spec, shape.num_kv_heads, shape.head_dim)
    return lambda protocol, rope: hf_quantized.HfQuantizedCache(spec, shape.num_layers)


def _static(spec: Any, shape: ModelShape, tables: Tables) -> CacheFactory:
    return lambda protocol, rope: StaticFp16Cache(shape.num_layers, spec.room)


def _reference(spec: Any, shape: ModelShape, tables: Tables) -> CacheFactory:
    found = [ReferenceTables(spec, layer) for layer in _tables(spec.kind, tables)]
    return lambda protocol, rope: ReferenceCache(found, rope, protocol)


# Schemes that bring a whole cache.
CACHES: dict[str, Callable[[Any, ModelShape, Tables], CacheFactory]] = {
    "fp16-static": _static,
    "hf-fp8": _hf,
    "hf-hqq": _hf,
    "hf-quanto": _hf,
    "kvquant-ref": _reference,
}


def build_codecs(spec: Any, num_layers: int, tables: Tables) -> list[Codec] | None:
    """One codec a layer; None for schemes without codecs.

    Args:
        spec: The scheme.
        num_layers: Layers of the model.
        tables: The quantizer file's layers, for schemes that need calibration.
    """
    if spec.kind == "fp16" or spec.kind in CACHES:
        return None
    if spec.kind not in CODECS:
        raise unknown("scheme kind", spec.kind, [*CODECS, *CACHES, "fp16"])
    return [CODECS[spec.kind](spec, layer, tables) for layer in range(num_layers)]


def build_caches(spec: Any, shape: ModelShape, tables: Tables) -> CacheFactory | None:
    """What makes the scheme's own caches; None for schemes that have none.

    Args:
        spec: The scheme.
        shape: Of the model.
        tables: As for :func:`build_codecs`.

    Raises:
        UserError: The scheme cannot serve the model, or a package is missing.
    """
    made = CACHES.get(spec.kind)
    return None if made is None else made(spec, shape, tables)
