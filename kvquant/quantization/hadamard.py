"""The orthogonal Hadamard rotation of vectors, computed by butterflies.

A vector of `m * 2**k` elements, `m` one of 1, 12, 20, 28, is rotated by the Kronecker product of a
Paley matrix of order `m` (Paley, J. Math. Phys. 12, 1933) and Sylvester's matrix of order `2**k`.
The sums are elementwise operations in a fixed order and not a matrix product, whose rounding may
change with the number of rows: a token's codes must not depend on the batch it stands in.
"""

from __future__ import annotations

import functools
import math

import torch

from kvquant.errors import UserError

# Order of a Paley matrix to the prime that it is constructed from.
_PALEY = {12: 11, 20: 19, 28: 13}


def factors(size: int) -> tuple[int, int]:
    """Returns the factors `(m, 2**k)` of a size for which Hadamard matrices are known.

    Raises:
        UserError: The size has no such factors.
    """
    for order in (1, *_PALEY):
        rest = size // order
        if size > 0 and size % order == 0 and rest & (rest - 1) == 0:
            return order, rest
    raise UserError(
        f"head_dim: no Hadamard rotation of {size} elements: it must be a power of two, or 12, 20 "
        "or 28 times one; choose a scheme without rotation for this model"
    )


@functools.cache
def _paley(order: int) -> tuple[tuple[int, ...], ...]:
    """Returns the rows of a Hadamard matrix of the given order, of elements +1 and -1."""
    prime = _PALEY[order]
    squares = {i * i % prime for i in range(1, prime)}

    def residue(i: int) -> int:
        return 0 if i % prime == 0 else (1 if i % prime in squares else -1)

    if prime % 4 == 3:  # Paley's first construction: I + S, S skew
        first = (1,) * order
        rows = [(-1, *((i == j) + residue(i - j) for j in range(prime))) for i in range(prime)]
        return (first, *rows)
    # The second one: a symmetric conference matrix, its zeros and signs replaced by 2 x 2 blocks.
    conference = [(0, *(1,) * prime)]
    conference += [(1, *(residue(i - j) for j in range(prime))) for i in range(prime)]
    out: list[tuple[int, ...]] = []
    for i, line in enumerate(conference):
        for top in (True, False):
            row: list[int] = []
            for j, sign in enumerate(line):
                if i == j:
                    row += [1, -1] if top else [-1, -1]
                else:
                    row += [sign, sign] if top else [sign, -sign]
            out.append(tuple(row))
    return tuple(out)


def _multiply(x: torch.Tensor, order: int, *, transposed: bool) -> torch.Tensor:
    """Multiplies the second to last dimension of `[..., order, n]` by Paley's matrix."""
    matrix = _paley(order)
    parts = x.unbind(-2)
    out = []
    for i in range(order):
        signs = [matrix[j][i] if transposed else matrix[i][j] for j in range(order)]
        total = torch.zeros_like(parts[0])
        for sign, part in zip(signs, parts, strict=True):
            total = total + part if sign > 0 else total - part
        out.append(total)
    return torch.stack(out, -2)


def rotate(x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotates the last dimension, or rotates it back; lengths are kept.

    Args:
        x: fp32 or fp64 `[..., size]`, `size` as :func:`factors` allows.
        inverse: Whether to rotate back.

    Returns:
        The same dtype and shape.
    """
    size = x.shape[-1]
    order, power = factors(size)
    half = 1
    flat = x.reshape(-1, order, power)
    while half < power:
        pairs = flat.view(-1, order, power // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        flat = torch.stack((low + high, low - high), -2).view(-1, order, power)
        half *= 2
    if order > 1:
        flat = _multiply(flat, order, transposed=inverse)
    return (flat * (1.0 / math.sqrt(size))).view(x.shape)
