"""KV-cache quantization for batched prefill: library and measured, reproducible study.

The public classes below are imported when they are first used, so that `import kvquant` costs no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvquant.cache.kvquant_cache import KVQuantCache
    from kvquant.energy.monitor import EnergyMonitor
    from kvquant.energy.profiler import DetailedEnergyProfiler
    from kvquant.formats.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix
    from kvquant.models.loading import load_quantized_model
    from kvquant.models.prefill_quant import PrefillQuantizedAttention
    from kvquant.quantization.batched_quant import BatchedKVQuantizer

__version__ = "0.1.0"
__all__ = [
    "BatchedKVQuantizer",
    "BlockedCSCMatrix",
    "BlockedCSRMatrix",
    "DetailedEnergyProfiler",
    "EnergyMonitor",
    "KVQuantCache",
    "PrefillQuantizedAttention",
    "load_quantized_model",
]

_MODULES = {
    "BatchedKVQuantizer": "quantization.batched_quant",
    "BlockedCSCMatrix": "formats.blocked_sparse",
    "BlockedCSRMatrix": "formats.blocked_sparse",
    "DetailedEnergyProfiler": "energy.profiler",
    "EnergyMonitor": "energy.monitor",
    "KVQuantCache": "cache.kvquant_cache",
    "PrefillQuantizedAttention": "models.prefill_quant",
    "load_quantized_model": "models.loading",
}


def __getattr__(name: str) -> Any:
    """Imports a public class at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'kvquant' has no attribute '{name}'")
    return getattr(importlib.import_module(f"kvquant.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
