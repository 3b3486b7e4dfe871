"""KV-cache quantization for batched prefill: library and measured, reproducible study.

`calibrate` builds a quantizer for a model, `load` gives the model the cache of a scheme, `generate`
answers texts over it, `unwrap` gives the model its own attention back; docs/library.md explains
them. Public names are imported when they are first used, so that `import kvquant` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvquant.cache.kvquant_cache import KVQuantCache
    from kvquant.calibration.from_texts import calibrate
    from kvquant.energy.monitor import EnergyMonitor
    from kvquant.energy.profiler import DetailedEnergyProfiler
    from kvquant.errors import UserError
    from kvquant.formats.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix
    from kvquant.models.loading import load, load_quantized_model
    from kvquant.models.prefill_quant import PrefillQuantizedAttention
    from kvquant.models.quantized_model import QuantizedModel, unwrap
    from kvquant.models.text_generation import generate
    from kvquant.quantization.batched_quant import BatchedKVQuantizer
    from kvquant.quantization.quantizer import Quantizer, load_quantizer
    from kvquant.study.presets import scheme_presets

__version__ = "0.1.0"
__all__ = [
    "BatchedKVQuantizer",
    "BlockedCSCMatrix",
    "BlockedCSRMatrix",
    "DetailedEnergyProfiler",
    "EnergyMonitor",
    "KVQuantCache",
    "PrefillQuantizedAttention",
    "QuantizedModel",
    "Quantizer",
    "UserError",
    "calibrate",
    "generate",
    "load",
    "load_quantized_model",
    "load_quantizer",
    "scheme_presets",
    "unwrap",
]

_MODULES = {
    "BatchedKVQuantizer": "quantization.batched_quant",
    "BlockedCSCMatrix": "formats.blocked_sparse",
    "BlockedCSRMatrix": "formats.blocked_sparse",
    "DetailedEnergyProfiler": "energy.profiler",
    "EnergyMonitor": "energy.monitor",
    "KVQuantCache": "cache.kvquant_cache",
    "PrefillQuantizedAttention": "models.prefill_quant",
    "QuantizedModel": "models.quantized_model",
    "Quantizer": "quantization.quantizer",
    "UserError": "errors",
    "calibrate": "calibration.from_texts",
    "generate": "models.text_generation",
    "load": "models.loading",
    "load_quantized_model": "models.loading",
    "load_quantizer": "quantization.quantizer",
    "scheme_presets": "study.presets",
    "unwrap": "models.quantized_model",
}


def __getattr__(name: str) -> Any:
    """Imports a public class at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'kvquant' has no attribute '{name}'")
    return getattr(importlib.import_module(f"kvquant.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
