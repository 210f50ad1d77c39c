"""Measuring a model, generator or teacher, in one process: one pass of images feeds all metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.evaluation.features import FeatureNetwork, load_features
from sid_ray.evaluation.fid import Sampler, frechet_distance, heun_sampler, one_step_sampler, quantise
from sid_ray.evaluation.metrics import inception_score, kernel_distance, precision_recall
from sid_ray.evaluation.statistics import FeatureStatistics, ReferenceStatistics, load_reference
from sid_ray.teachers.sources import load_denoiser

METRICS = {
    "fid": "Frechet distance to the reference; lower is better",
    "is": "inception score, 10 splits; higher is better",
    "kid": "kernel distance to the reference; lower is better",
    "pr": "precision and recall, k = 3; higher is better",
}
"""What can be measured."""


class Setup(NamedTuple):
    """A model and what it is measured with, checked to fit together."""

    sampler: Callable[[int], Sampler]
    """Sampler of a seed."""
    features: FeatureNetwork
    reference: ReferenceStatistics
    metrics: list[str]


def prepare(model: str, metrics: str, features: str, reference: str, steps: int = 18) -> Setup:
    """Load everything and check that it fits. `metrics`: names with commas; `steps`: Heun steps of a teacher.

    UserError if a metric is unknown or cannot be had from the feature network or the reference, or if the
    reference is another feature network's.
    """
    wanted = [m.strip() for m in metrics.split(",") if m.strip()]
    for name in wanted or [metrics]:
        if name not in METRICS:
            raise UserError(f"--metrics: {name!r} is not allowed; allowed: {', '.join(METRICS)}")
    network, against = load_features(features), load_reference(reference)
    if len(against.mu) != network.num_features or against.features not in ("", network.name):
        raise UserError(
            f"--reference: {reference} has {len(against.mu)} features of {against.features or 'an unnamed network'}, "
            f"--features {network.name} has {network.num_features}"
        )
    if against.sample is None and (needing := [m for m in wanted if m in ("kid", "pr")]):
        raise UserError(f"--metrics: {needing[0]!r} needs a reference with features of images; {reference} has none")
    if "is" in wanted and network.probabilities(torch.zeros(1, network.num_features)) is None:
        raise UserError(f"--metrics: 'is' needs a feature network that knows classes; {network.name} does not")
    denoiser, config = load_denoiser(model)

    def sampler(seed: int) -> Sampler:
        if config.kind == "generator" and config.sigma_init is not None:
            return one_step_sampler(denoiser, config.sigma_init, seed, class_weights=config.class_weights)
        return heun_sampler(denoiser, seed, steps)

    return Setup(sampler, network, against, wanted)


@torch.no_grad()
def measure(
    setup: Setup, num: int, seed: int, batch: int = 250, progress: Callable[[int], Any] = lambda count: None
) -> dict[str, float]:
    """Measure `num` images of a seed: name -> value. `progress` is told of each batch's images.

    An image that is not finite makes every value NaN.
    """
    sample, parts = setup.sampler(seed), []
    for start in range(0, num, batch):
        images = sample(range(start, min(start + batch, num)))
        extracted = setup.features(quantise(images))
        broken = ~images.isfinite().flatten(1).all(1)
        parts.append(extracted.masked_fill(broken[:, None], math.nan))
        progress(len(images))
    return scores(torch.cat(parts), setup)


def scores(features: Tensor, setup: Setup) -> dict[str, float]:
    """The wanted metrics of generated images' features (N, d)."""
    values: dict[str, float] = {}
    real = torch.empty(0) if setup.reference.sample is None else torch.from_numpy(setup.reference.sample)
    for metric in setup.metrics:
        if metric == "fid":
            values["FID"] = frechet_distance(FeatureStatistics.of(features), setup.reference)
        elif metric == "is":
            probabilities = setup.features.probabilities(features)
            assert probabilities is not None
            values["IS"] = inception_score(probabilities, splits=min(10, len(features))).mean
        elif metric == "kid":
            values["KID"] = kernel_distance(features, real).mean
        else:
            both = precision_recall(features, real)
            values |= {"precision": both.precision, "recall": both.recall}
    return values if bool(features.isfinite().all()) else dict.fromkeys(values, math.nan)


def too_few(setup: Setup, num: int) -> str | None:
    """A warning if FID is far from what more images would give; None if there are enough."""
    d = setup.features.num_features
    if "fid" not in setup.metrics or num > d:
        return None
    return (
        f"{num} images for {d} features: their covariance is singular, and FID comes out far too high; it can only be "
        f"compared with FIDs of {num} images"
    )
