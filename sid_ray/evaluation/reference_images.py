"""Reference statistics of images, in one pass and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.evaluation.feature_network import FeatureNetwork
from sid_ray.evaluation.statistics import FeatureStatistics, ReferenceStatistics

SAMPLE = 10_000
"""Images whose features a reference keeps, for KID, precision and recall."""


@torch.no_grad()
def reference_statistics(
    batches: Iterable[Tensor],
    num: int,
    features: FeatureNetwork,
    *,
    sample: int = SAMPLE,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], Any] = lambda count: None,
) -> ReferenceStatistics:
    """Statistics of `num` uint8 images, given in batches (n, C, H, W), and the features of `sample` of them.

    Moments are summed in float64. Which images are kept is drawn without replacement from (num, seed); all of them if
    there are no more, none for `sample` 0. `features` is on `device`. UserError for fewer than two images, or
    features that are not finite.
    """
    if num < 2:
        raise UserError(f"IMAGES: reference statistics need two images or more, found {num}")
    chosen = torch.zeros(num, dtype=torch.bool)
    chosen[torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:sample]] = True
    total, kept = FeatureStatistics.zeros(features.num_features), [torch.empty(0, features.num_features)]
    for images in batches:
        extracted = features(images.to(device)).cpu()
        kept.append(extracted[chosen[total.num : total.num + len(images)]])
        total = total + FeatureStatistics.of(extracted)
        progress(len(images))
    if not bool(total.outer.isfinite().all()):
        raise UserError(f"evaluation.features: {features.name} gives features that are not finite on these images")
    return ReferenceStatistics(
        total.mean.numpy(),
        total.covariance.numpy(),
        total.num,
        features.name,
        torch.cat(kept).numpy() if sample else None,
    )


def reference_from_images(images: Tensor, features: FeatureNetwork, batch: int = 512) -> ReferenceStatistics:
    """Reference statistics of uint8 images (N, C, H, W) in memory, with the features of all of them."""
    return reference_statistics(images.split(batch), len(images), features, sample=len(images))
