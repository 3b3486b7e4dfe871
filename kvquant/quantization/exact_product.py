"""Products of vectors and matrices that are exact, so that no order of summation changes them.

A token's codes must not depend on the batch it stands in, but a matrix product may round otherwise
for another number of rows. Here a vector is divided by its largest magnitude and rounded to
multiples of 2**-20, which is finer than 16-bit numbers are, and a matrix to multiples of 2**-24.
The products of these whole numbers have at most 44 bits, and a sum of 256 has at most 52, which
float64 holds exactly.
"""

from __future__ import annotations

import functools

import torch

VECTOR, MATRIX = 2.0**20, 2.0**24
MAX_SIZE = 256


def to_grid(x: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Returns `x / peak` in units of `1 / VECTOR`: whole numbers, as fp32.

    Args:
        x: fp32.
        peak: fp32 that broadcasts with `x` and is nowhere smaller in magnitude; 0 for zeros.
    """
    return (x / torch.where(peak == 0, torch.ones_like(peak), peak)).mul_(VECTOR).round_()


def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Returns the exact float64 product of whole numbers.

    Args:
        rows: `[heads, tokens, n]`, at most `VECTOR` in magnitude.
        matrix: `[heads, n, m]`, at most `MATRIX` in magnitude; `n` at most `MAX_SIZE`.
    """
    return rows.double() @ matrix.double()


@functools.lru_cache(maxsize=2048)
def random_rotation(size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Returns a rotation drawn uniformly, in units of `1 / MATRIX`: fp32 `[size, size]`.

    All caches of the process share it.
    """
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        q = q * r.diagonal().sign()  # makes the factorization unique, and the draw uniform
        if float(torch.linalg.det(q)) < 0:
            q[:, 0] = -q[:, 0]
        return (q * MATRIX).round().float().to(device)
