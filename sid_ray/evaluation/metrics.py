"""Inception score, kernel distance, precision and recall, as pure functions of features or probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EQUAL = 1e-12
"""Squared distances below this share of the points' squared norms are those of equal points."""


class MeanAndDeviation(NamedTuple):
    """A score measured on parts of the images."""

    mean: float
    deviation: float
    """Standard deviation over the parts (of the population of parts, as the papers report it)."""


def inception_score(probabilities: Tensor, splits: int = 10) -> MeanAndDeviation:
    """exp of the mean KL divergence between an image's classes and those of its split (Salimans et al. 2016).

    `probabilities`: class probabilities (N, classes), in the order the images were drawn. Between 1 and the number
    of classes; higher is better. ValueError for fewer images than splits.
    """
    n = len(probabilities)
    if not 1 <= splits <= n:
        raise ValueError(f"the inception score needs at least one image per split: {n} images, {splits} splits")
    scores = []
    for i in range(splits):
        part = probabilities[i * n // splits : (i + 1) * n // splits].double().clamp(min=1e-16)
        divergence = (part * (part.log() - part.mean(dim=0).log())).sum(dim=1)
        scores.append(divergence.mean().exp())
    together = torch.stack(scores)
    return MeanAndDeviation(float(together.mean()), float(together.std(unbiased=False)))


def kernel_distance(
    generated: Tensor, real: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> MeanAndDeviation:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (KID, Binkowski et al. 2018).

    `generated` (N, d), `real` (M, d). Mean over random subsets of at most `subset_size` of each. 0 for equal
    distributions, and then slightly negative as often as positive. ValueError for fewer than two of either.
    """
    size = min(len(generated), len(real), subset_size)
    if size < 2:
        raise ValueError(f"KID needs two images or more of either kind, got {len(generated)} and {len(real)}")
    rng = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        x = generated[torch.randperm(len(generated), generator=rng)[:size].to(generated.device)].double()
        y = real[torch.randperm(len(real), generator=rng)[:size].to(real.device)].double()
        within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y))) / (size * (size - 1))
        distances.append(within - 2 * _kernel(x, y).mean())
    together = torch.stack(distances)
    return MeanAndDeviation(float(together.mean()), float(together.std(unbiased=False)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class PrecisionRecall(NamedTuple):
    """Fidelity and diversity, each between 0 and 1."""

    precision: float
    """Share of generated images that lie among the real ones."""
    recall: float
    """Share of real images that lie among the generated ones."""


def precision_recall(generated: Tensor, real: Tensor, k: int = 3, block: int = 5_000) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): an image lies among others if it is no further
    from one of them than that one's k-th neighbour of its own kind.

    `generated` (N, d), `real` (M, d). At most `block` x `block` distances are in memory at a time. ValueError for
    k or fewer images of either kind.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images, got {len(generated)} and {len(real)}")
    return PrecisionRecall(
        precision=_share_among(generated, real, _radii(real, k, block), block),
        recall=_share_among(real, generated, _radii(generated, k, block), block),
    )


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of each point (N, d) to its k-th neighbour, itself left out, (N,)."""
    radii = []
    for rows in features.split(block):
        nearest = torch.empty((len(rows), 0), dtype=torch.float64, device=features.device)
        for columns in features.split(block):
            candidates = torch.cat([nearest, _squared_distances(rows, columns)], dim=1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, k])
    return torch.cat(radii)


def _share_among(points: Tensor, others: Tensor, radii: Tensor, block: int) -> float:
    """Share of points (N, d) within the squared radius (M,) of one of the others (M, d)."""
    found = []
    for rows in points.split(block):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, radius in zip(others.split(block), radii.split(block), strict=True):
            inside |= (_squared_distances(rows, columns) <= radius).any(dim=1)
        found.append(inside)
    return float(torch.cat(found).double().mean())


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M) in float64, by a matrix product.

    What the product's cancellation leaves of the distance of equal points is set to 0: features are float32, which
    cannot tell points closer than that apart.
    """
    x, y = x.double(), y.double()
    sizes = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(sizes, x, y.T, alpha=-2)
    return squares.masked_fill_(squares < EQUAL * sizes, 0.0)
