"""From a scheme's entry in the study to the codec of each layer."""

from __future__ import annotations

from collections.abc import Callable

from kvquant.batched_quant import LayerQuantizer
from kvquant.config import Fp16Scheme, KiviScheme, NuqScheme, SchemeSpec
from kvquant.errors import UserError, unknown
from kvquant.schemes.base import Codec
from kvquant.schemes.kivi import KiviCodec
from kvquant.schemes.nuq import NuqCodec

Tables = list[LayerQuantizer] | None


def _nuq(spec: SchemeSpec, layer: int, tables: Tables) -> Codec:
    assert isinstance(spec, NuqScheme)
    if tables is None:
        raise UserError("quantizer: scheme kind 'nuq' needs a quantizer file (run `quantize`)")
    return NuqCodec(spec, tables[layer])


def _kivi(spec: SchemeSpec, layer: int, tables: Tables) -> Codec:
    assert isinstance(spec, KiviScheme)
    return KiviCodec(spec)


CODECS: dict[str, Callable[[SchemeSpec, int, Tables], Codec]] = {"nuq": _nuq, "kivi": _kivi}


def build_codecs(spec: SchemeSpec, num_layers: int, tables: Tables) -> list[Codec] | None:
    """One codec a layer; None for the unquantized cache.

    Args:
        spec: The scheme.
        num_layers: Layers of the model.
        tables: The quantizer file's layers, for schemes that need calibration.
    """
    if isinstance(spec, Fp16Scheme):
        return None
    if spec.kind not in CODECS:
        raise unknown("scheme kind", spec.kind, CODECS)
    return [CODECS[spec.kind](spec, layer, tables) for layer in range(num_layers)]
