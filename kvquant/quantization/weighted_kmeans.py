"""Weighted k-means of many small sets of vectors at once, with a k-means++ start.

Each *problem* is a set of points with weights of its own. Problems are solved side by side, because
one of them (the few channels of one head that share a code) is too small to fill a processor.
"""

from __future__ import annotations

import torch

MAX_ITERATIONS = 100
TOLERANCE = 1e-4  # of the loss; a smaller share gained by an iteration ends the search
PIECE = 2**22  # distances that are computed at a time


def _square_distances(columns: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Returns those of `[problems, dim, points]` to one center each, `[problems, points]`."""
    total = torch.zeros_like(columns[:, 0])
    for column, coordinate in zip(columns.unbind(1), center.unsqueeze(2).unbind(1), strict=True):
        total += (column - coordinate).square_()
    return total


def _draw(mass: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws one index per row with probabilities proportional to `mass`, `[rows, points]`.

    A row without any mass gives its last index.
    """
    cumulated = mass.double().cumsum(1)
    chosen = torch.rand(len(mass), 1, generator=generator, dtype=torch.float64).to(mass.device)
    index = torch.searchsorted(cumulated, chosen * cumulated[:, -1:], right=True)
    return index.squeeze(1).clamp_(max=mass.shape[1] - 1)


def spread_centers(
    points: torch.Tensor, weights: torch.Tensor, count: int, seed: int
) -> torch.Tensor:
    """Draws centers as k-means++ does: by weight times squared distance to the nearest so far.

    Reference: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.

    Args:
        points: fp32 `[problems, points, dim]`.
        weights: fp32 `[problems, points]`, not negative.
        count: Number of centers. If there are fewer distinct points of positive weight, centers
            repeat.
        seed: Of the draws.

    Returns:
        fp32 `[problems, count, dim]`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(points), device=points.device)
    centers = points.new_empty(len(points), count, points.shape[2])
    columns = points.mT.contiguous()
    nearest = torch.ones_like(weights)
    for number in range(count):
        chosen = points[rows, _draw(weights * nearest, generator)]
        centers[:, number] = chosen
        distance = _square_distances(columns, chosen)
        nearest = distance if number == 0 else torch.minimum(nearest, distance)
    return centers


def _smallest(table: torch.Tensor) -> torch.Tensor:
    """Returns the index of the smallest number along the last dimension."""
    if table.device.type == "cpu":  # NumPy is six times as fast there
        return torch.from_numpy(table.numpy().argmin(-1))
    return table.argmin(-1)


def _assign(points: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the nearest center of each point, and the squared distance to it."""
    # All but the square of the point, which is the same for all centers, is one product.
    ones = points.new_ones(*points.shape[:2], 1)
    offsets = centers.square().sum(-1, keepdim=True)
    table = torch.cat([points, ones], 2) @ torch.cat([centers * -2, offsets], 2).mT
    index = _smallest(table)
    # Of the nearest alone the distance is computed as such, because the product rounds.
    nearest = centers.gather(1, index.unsqueeze(2).expand_as(points))
    return index, (points - nearest).square_().sum(-1)


def _means(
    points: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, centers: torch.Tensor
) -> torch.Tensor:
    """Returns the weighted mean of each center's points; a center without weight stays."""
    problems, count, dim = centers.shape
    first = torch.arange(problems, device=points.device).unsqueeze(1) * count
    flat = (index + first).view(-1)
    total = weights.new_zeros(problems * count).index_add_(0, flat, weights.reshape(-1))
    sums = points.new_zeros(problems * count, dim)
    sums.index_add_(0, flat, (points * weights.unsqueeze(2)).reshape(-1, dim))
    means = sums / total.unsqueeze(1)
    return torch.where(total.unsqueeze(1) > 0, means, centers.view(-1, dim)).view_as(centers)


def improve_centers(
    points: torch.Tensor, weights: torch.Tensor, centers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs Lloyd's iterations until no problem gains more than a small share of its loss.

    Args:
        points: fp32 `[problems, points, dim]`.
        weights: fp32 `[problems, points]`, not negative.
        centers: fp32 `[problems, count, dim]`, where to start.

    Returns:
        Centers of the same shape, and each problem's loss: the sum of weights times squared
        distances to the nearest center, fp32 `[problems]`.
    """
    index, distance = _assign(points, centers)
    loss = (weights * distance).sum(1)
    for _ in range(MAX_ITERATIONS):
        moved = _means(points, weights, index, centers)
        index, distance = _assign(points, moved)
        found = (weights * distance).sum(1)
        better = found < loss
        centers = torch.where(better[:, None, None], moved, centers)
        gained = bool((loss - found > TOLERANCE * loss).any())
        loss = torch.minimum(loss, found)
        if not gained:
            break
    return centers, loss


def weighted_kmeans(
    points: torch.Tensor, weights: torch.Tensor, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the centers of each problem.

    Args:
        points: fp32 `[problems, points, dim]`.
        weights: fp32 `[problems, points]`, not negative. A problem without any weight counts all of
            its points equally.
        count: Number of centers.
        seed: Of the k-means++ start.

    Returns:
        fp32 `[problems, count, dim]`, and the loss of each problem, `[problems]`.
    """
    step = max(1, PIECE // (points.shape[1] * count))
    found, losses = [], []
    for number, (x, w) in enumerate(zip(points.split(step), weights.split(step), strict=True)):
        largest = w.amax(1, keepdim=True)
        even = torch.where(largest > 0, w / largest, torch.ones_like(w))
        # Centered, because differences of large squares would lose small distances. Weights do not
        # count here: a single heavy point far away would pull the center off all others.
        mean = x.mean(1, keepdim=True)
        start = spread_centers(x - mean, even, count, seed + number)
        centers, loss = improve_centers(x - mean, even, start)
        found.append(centers + mean)
        losses.append(loss * largest.squeeze(1))
    return torch.cat(found), torch.cat(losses)
