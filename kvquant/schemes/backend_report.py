"""Reports which backends a scheme's cache would use with a model, before either is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvquant.cache.block_store import stored_dtype
from kvquant.kernels.backends import Operation, Selection, report
from kvquant.kernels.cache_shape import LOOKED_UP_BITS, CacheShape
from kvquant.study.scheme_kinds import Scheme
from kvquant.study.schemes import AllocatedScheme, NuqScheme


def backend_report(
    scheme: Scheme,
    *,
    head_dim: int,
    kv_heads: int,
    query_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    protocol: str = "A",
    static_rope: bool = True,
    kept_rope: bool | None = None,
    rotates_values: bool = False,
) -> dict[Operation, Selection]:
    """Selects the backend of each operation without loading, compiling or allocating anything.

    It holds for layers that see all tokens. Those with a sliding window keep it in 16 bits, which
    PyTorch reads on any device.

    What is known only after calibration or during a call is assumed to suit the kernels.

    Args:
        scheme: The scheme of the cache.
        head_dim: Number of channels per head.
        kv_heads: Number of key and value heads.
        query_heads: Number of query heads.
        dtype: The dtype of the model's weights.
        device: The device that the model will be on.
        protocol: The protocol, "A" or "B".
        static_rope: Whether one rotary table serves all layers, channels and lengths of a sequence.
        kept_rope: Whether the cache keeps a rotation per token, as rope scaling changes with the
            length; None: where `static_rope` is false.
        rotates_values: Whether the model's weights cannot take the rotation of values by allocated
            codes.

    Returns:
        One selection per operation, whose `backend`, `refused` and `lines()` can be printed. The
        mapping is empty for a scheme that does not pack blocks.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the known values.
    """
    if scheme.registration.codec is None:
        return {}
    shape = CacheShape(
        head_dim=head_dim,
        kv_heads=kv_heads,
        queries_per_kv_head=query_heads // kv_heads,
        dtype=stored_dtype(dtype),
        codebook=scheme.kind,
        block_size=64,  # other kinds may have other sizes, but nothing here depends on it
        query_dtype=dtype,
        protocol=protocol,
        static_rope=static_rope,
        kept_rope=not static_rope if kept_rope is None else kept_rope,
    )
    if isinstance(scheme, AllocatedScheme):
        shape = replace(
            shape,
            block_size=scheme.block_size,
            bits=LOOKED_UP_BITS,
            sinks=scheme.sinks,
            outliers=scheme.outliers,
            range_per_head=scheme.value_range == "token-head",
            rotates_values=rotates_values and scheme.rotation,
        )
    if isinstance(scheme, NuqScheme):
        shape = replace(
            shape,
            block_size=scheme.block_size,
            bits=scheme.bits,
            sinks=scheme.sinks,
            outliers=scheme.outliers,
            rotated_keys=scheme.keys_after_rope,
        )
    return report(shape, device)
