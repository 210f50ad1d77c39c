"""Measuring a model, generator or teacher: one pass of images feeds all metrics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sid_ray.config import INCEPTION_ADDRESS
from sid_ray.errors import UserError
from sid_ray.evaluation.feature_network import FeatureNetwork
from sid_ray.evaluation.features import absolute_features, load_features
from sid_ray.evaluation.fid import Sampler, frechet_distance, heun_sampler, one_step_sampler, quantise
from sid_ray.evaluation.metrics import inception_score, kernel_distance, precision_recall
from sid_ray.evaluation.parts import Part, cut, local_device, run_here
from sid_ray.evaluation.statistics import FeatureStatistics, ReferenceStatistics, check_fits, load_reference
from sid_ray.teachers.model_directory import absolute
from sid_ray.teachers.modules import named_network
from sid_ray.teachers.sources import load_denoiser, read_any_config

METRICS = {
    "fid": "Frechet distance to the reference; lower is better",
    "is": "inception score, 10 splits; higher is better",
    "kid": "kernel distance to the reference; lower is better",
    "pr": "precision and recall, k = 3; higher is better",
}
"""What can be measured."""
ENOUGH_FOR_INCEPTION = 10_000
"""Below this, Inception's FID is mostly bias."""


@dataclass(frozen=True)
class SampledFeatures:
    """Features of a model's samples: the work of measuring, a part at a time (`parts.Work`)."""

    model: str
    features: str
    detector: str
    steps: int
    """Heun steps of a teacher."""
    network: str | None = None
    """`python:package.module:factory` of the model's network, if that is the user's own code."""

    def load(self, device: torch.device) -> Callable[[Part], Tensor]:
        """Function from a part to its features, float32 (n, d), on the CPU. An image that is not finite has NaN."""
        sampler, shape = load_sampler(self.model, self.steps, device, self.network)
        network = load_features(self.features, shape, self.detector).to(device)

        @torch.no_grad()
        def run(part: Part) -> Tensor:
            images = sampler(part.seed)(part.numbers)
            broken = ~images.isfinite().flatten(1).all(1)
            return network(quantise(images)).masked_fill(broken[:, None], math.nan).cpu()

        return run


def load_sampler(
    model: str, steps: int, device: torch.device | str, network: str | None = None
) -> tuple[Callable[[int], Sampler], tuple[int, int, int]]:
    """(sampler of a seed, shape of its images) of a generator, in one step, or of a teacher, in Heun steps."""
    denoiser, config = load_denoiser(model, "model", named_network(network))
    denoiser.to(device).requires_grad_(False)

    def sampler(seed: int) -> Sampler:
        if config.kind == "generator" and config.sigma_init is not None:
            return one_step_sampler(denoiser, config.sigma_init, seed, device, config.class_weights)
        return heun_sampler(denoiser, seed, steps, device)

    return sampler, denoiser.image_shape


class Setup(NamedTuple):
    """A model and what it is measured with, checked to fit together."""

    work: SampledFeatures
    features: FeatureNetwork
    """On the CPU, for the classes of what other processes looked at."""
    reference: ReferenceStatistics
    metrics: list[str]


def prepare(
    model: str,
    metrics: str,
    features: str,
    reference: str,
    steps: int = 18,
    detector: str = INCEPTION_ADDRESS,
    network: str | None = None,
) -> Setup:
    """Load all but the model's weights and check that it fits. `metrics`: names with commas; `steps`: a teacher's.

    UserError if a metric is unknown or cannot be had from the feature network or the reference, or if the
    reference is another feature network's.
    """
    wanted = list(dict.fromkeys(m.strip() for m in metrics.split(",") if m.strip()))
    for name in wanted or [metrics]:
        if name not in METRICS:
            raise UserError(f"--metrics: {name!r} is not allowed; allowed: {', '.join(METRICS)}")
    shape = read_any_config(model).image_shape()
    looking, against = load_features(features, shape, detector), load_reference(reference)
    check_fits(against, looking, f"--reference: {reference}")
    if against.sample is None and (needing := [m for m in wanted if m in ("kid", "pr")]):
        raise UserError(
            f"--metrics: {needing[0]!r} needs a reference with features of images, such as sid-ray stats makes; "
            f"{reference} has none"
        )
    if "is" in wanted and looking.probabilities(torch.zeros(1, looking.num_features)) is None:
        raise UserError(f"--metrics: 'is' needs a feature network that knows classes; {looking.name} does not")
    work = SampledFeatures(absolute(model), absolute_features(features), absolute(detector), steps, network)
    return Setup(work, looking, against, wanted)


def measure(
    setup: Setup, num: int, seed: int, batch: int = 250, progress: Callable[[int], Any] = lambda count: None
) -> dict[str, float]:
    """Measure `num` images of a seed in this process: name -> value. `progress` is told of each batch's images.

    An image that is not finite makes every value NaN.
    """
    results = run_here(setup.work, cut([seed], num, batch))
    return dict(measure_seeds(results, setup, num, progress))[seed]


def measure_seeds(
    results: Iterable[tuple[Part, Tensor]], setup: Setup, num: int, progress: Callable[[int], Any] = lambda count: None
) -> Iterator[tuple[int, dict[str, float]]]:
    """(seed, its metrics) as soon as the features of all its `num` images have come, in whatever order they come."""
    waiting: dict[int, tuple[Tensor, int]] = {}
    for part, features in results:
        rows, missing = waiting.pop(part.seed, (torch.empty(num, features.shape[1]), num))
        rows[part.numbers.start : part.numbers.stop] = features
        progress(len(features))
        if missing > len(features):
            waiting[part.seed] = rows, missing - len(features)
        else:
            yield part.seed, scores(rows, setup)


def scores(features: Tensor, setup: Setup) -> dict[str, float]:
    """The wanted metrics of generated images' features (N, d); computed on the GPU if there is one."""
    values: dict[str, float] = {}
    ours = features.to(local_device())
    real = torch.empty(0) if setup.reference.sample is None else torch.from_numpy(setup.reference.sample).to(ours)
    for metric in setup.metrics:
        if metric == "fid":
            moments = (FeatureStatistics.of(part) for part in ours.split(10_000))
            values["FID"] = frechet_distance(functools.reduce(lambda a, b: a + b, moments), setup.reference)
        elif metric == "is":
            probabilities = setup.features.probabilities(features)
            assert probabilities is not None
            values["IS"] = inception_score(probabilities, splits=min(10, len(features))).mean
        elif metric == "kid":
            values["KID"] = kernel_distance(ours, real).mean
        else:
            both = precision_recall(ours, real)
            values |= {"precision": both.precision, "recall": both.recall}
    return values if bool(features.isfinite().all()) else dict.fromkeys(values, math.nan)


def warnings(setup: Setup, num: int) -> list[str]:
    """What keeps these numbers from being what they seem; empty if nothing is known to."""
    d, known = setup.features.num_features, setup.reference.num
    found = []
    if "fid" in setup.metrics:
        if num <= d:
            found.append(
                f"{num} images for {d} features: their covariance is singular, and FID comes out far too high; it can "
                f"only be compared with FIDs of {num} images"
            )
        elif setup.features.name == "inception" and num < ENOUGH_FOR_INCEPTION:
            found.append(
                f"FID of {num} images is biased upwards, by more the fewer they are; it can only be compared with FIDs "
                f"of {num} images (published ones are of 50,000)"
            )
        if not known:
            found.append(
                "the reference does not say of how many images it was made, nor by which network; that it was many "
                "(fewer raise FID) and this network is taken on trust"
            )
        elif known <= d:
            found.append(
                f"the reference was made of {known} images for {d} features: its covariance is singular, which raises "
                "FID however good the images are"
            )
    if "is" in setup.metrics and num < 10:
        found.append(f"{num} images make {num} splits of one image each, not 10: IS is 1 by definition")
    return found
