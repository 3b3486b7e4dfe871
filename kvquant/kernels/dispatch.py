"""Whether a kernel reads a cache, for callers that know only what it is compiled for."""

from __future__ import annotations

import torch

from kvquant.kernels.backends import select
from kvquant.kernels.cache_shape import CacheShape
from kvquant.kernels.cuda_decode import DecodeShape


def _cache_shape(shape: DecodeShape, query_dtype: torch.dtype | None = None) -> CacheShape:
    return CacheShape(
        head_dim=shape.head_dim,
        kv_heads=1,
        queries_per_kv_head=shape.group,
        dtype=shape.dtype,
        codebook="nuq",
        bits=shape.bits,
        block_size=shape.block_size,
        outliers=shape.fraction if shape.outliers else 0.0,
        query_dtype=query_dtype,
    )


def use_cuda(shape: DecodeShape, device: torch.device) -> bool:
    """Whether the CUDA decode kernel reads a cache of this shape."""
    return select("decode", _cache_shape(shape), device).backend == "cuda"


def use_triton_attention(shape: DecodeShape, queries: torch.Tensor) -> bool:
    """Whether the Triton kernels attend to a cache of this shape."""
    selection = select("past", _cache_shape(shape, queries.dtype), queries.device)
    return selection.backend == "triton"
