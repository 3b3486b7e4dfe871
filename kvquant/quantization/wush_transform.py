"""The WUSH transform of a head (Chen et al., arXiv 2609.38121, equation 1), in closed form.

What is quantized has second moments `M`, and an error `e` of it costs `e^T H e`. The transform
makes both diagonal with the same square root of their product, and a Hadamard matrix then spreads
them evenly over all coordinates, so that each is quantized alike and none matters more.
"""

from __future__ import annotations

import torch

from kvquant.quantization.hadamard import rotate


def _damped(x: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns a matrix plus a share of its mean diagonal; the unit matrix for zeros."""
    unit = torch.eye(len(x), dtype=x.dtype, device=x.device)
    mean = x.trace() / len(x)
    return x + damping * mean * unit if float(mean) > 0 else unit


def wush_transform(moments: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns the transform `T` of column vectors; neither argument's scale matters.

    Args:
        moments: `M`, float64 `[dim, dim]`, symmetric.
        hessian: `H`, the same shape.
        damping: Share of their mean diagonals that is added to `M` and `H`.

    Returns:
        float64 `[dim, dim]`, which keeps the mean square of the vectors.

    Raises:
        UserError: There is no Hadamard matrix of the size.
    """
    lower = torch.linalg.cholesky(_damped(hessian, damping))
    spread = _damped(moments, damping)
    values, vectors = torch.linalg.eigh(lower.mT @ spread @ lower)
    values = values.clamp(min=torch.finfo(values.dtype).tiny)
    scale = (spread.trace() / values.sqrt().sum()).sqrt()
    even = values.pow(-0.25)[:, None] * (vectors.mT @ lower.mT)
    return scale * rotate(even.mT.contiguous()).mT
