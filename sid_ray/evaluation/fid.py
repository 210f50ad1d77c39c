"""Fréchet inception distance of generated images (Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import draw_latents, generate
from sid_ray.diffusion.sampler import heun_sample
from sid_ray.errors import UserError
from sid_ray.evaluation.features import FeatureNetwork
from sid_ray.evaluation.statistics import FeatureStatistics, ReferenceStatistics

Sampler = Callable[[range], Tensor]
"""Image numbers -> their images, float (n, C, H, W), about [-1, 1]."""


def quantise(images: Tensor) -> Tensor:
    """Float images in about [-1, 1] as uint8 0..255: (x 127.5 + 128) clipped and truncated, as EDM's metrics do."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def frechet_distance(statistics: FeatureStatistics, reference: ReferenceStatistics) -> float:
    """FID of generated features against a reference: |m - mu|^2 + Tr(S + Sigma - 2 (S Sigma)^(1/2)), in float64.

    S Sigma has the eigenvalues of R S R with R = Sigma^(1/2), which is symmetric: they are real and well conditioned,
    also where covariances are singular (there the error is about 1e-7 of their trace).
    NaN if a sum is not finite; UserError if the dimensions differ; ValueError for fewer than two images.
    """
    d = len(statistics.sum)
    if reference.mu.shape != (d,):
        raise UserError(
            f"evaluation.reference: its features have dimension {len(reference.mu)} "
            f"({reference.features or 'network not recorded'}), those of evaluation.features have {d}"
        )
    if statistics.num < 2:
        raise ValueError(f"FID needs two images or more, got {statistics.num}")
    if not bool(statistics.sum.isfinite().all() and statistics.outer.isfinite().all()):
        return math.nan
    mu, sigma = torch.from_numpy(reference.mu), torch.from_numpy(reference.sigma)
    covariance = statistics.covariance.cpu()
    values, vectors = torch.linalg.eigh(sigma)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    means = (statistics.mean.cpu() - mu).square().sum()
    return max(float(means + covariance.trace() + sigma.trace() - 2 * overlap), 0.0)


@torch.no_grad()
def generator_statistics(
    sample: Sampler, num_images: int, features: FeatureNetwork, batch: int, rank: int = 0, world_size: int = 1
) -> FeatureStatistics:
    """Feature statistics of the images rank, rank + world_size, ... below `num_images`, on the CPU.

    At most `batch` images are in memory at a time. No collectives: the caller reduces over ranks. An image that
    is not finite makes the sums NaN, because quantising it would pass it off as an ordinary image.
    """
    own = range(rank, num_images, world_size)
    statistics = FeatureStatistics.zeros(features.num_features)
    for start in range(0, len(own), batch):
        images = sample(own[start : start + batch])
        extracted = features(quantise(images)).double()
        finite = images.isfinite().flatten(1).all(1)
        extracted = extracted.masked_fill(~finite[:, None], math.nan)
        statistics = statistics + _to_cpu(FeatureStatistics.of(extracted))
    return statistics


def _to_cpu(statistics: FeatureStatistics) -> FeatureStatistics:
    return FeatureStatistics(statistics.num, statistics.sum.cpu(), statistics.outer.cpu())


@torch.no_grad()
def image_features(images: Tensor, features: FeatureNetwork, batch: int = 512) -> Tensor:
    """Features (N, d) of uint8 images (N, C, H, W), on the CPU."""
    return torch.cat([features(part).cpu() for part in images.split(batch)])


def image_statistics(images: Tensor, features: FeatureNetwork, batch: int = 512) -> FeatureStatistics:
    """Feature statistics of uint8 images (N, C, H, W), on the CPU."""
    return FeatureStatistics.of(image_features(images, features, batch))


def one_step_sampler(
    denoiser: Denoiser,
    sigma_init: float,
    seed: int,
    device: torch.device | str = "cpu",
    class_weights: Sequence[float] | None = None,
) -> Sampler:
    """Images of a one-step generator by their numbers, D(sigma_init z; sigma_init); labels drawn per image.

    `denoiser`: on `device` and in eval mode (ValueError otherwise). Image i depends on (seed, i) only, to rounding.
    """
    _check_eval(denoiser)

    @torch.no_grad()
    def sample(numbers: range) -> Tensor:
        z, labels = draw_latents(denoiser, seed, numbers, class_weights=class_weights)
        return generate(denoiser, z.to(device), sigma_init, None if labels is None else labels.to(device))

    return sample


def heun_sampler(
    denoiser: Denoiser,
    seed: int,
    num_steps: int = 18,
    device: torch.device | str = "cpu",
    class_weights: Sequence[float] | None = None,
) -> Sampler:
    """Images of a diffusion model by their numbers, in 2 num_steps - 1 evaluations; labels drawn per image.

    `denoiser`: on `device` and in eval mode (ValueError otherwise). Image i depends on (seed, i) only, to rounding.
    """
    _check_eval(denoiser)

    @torch.no_grad()
    def sample(numbers: range) -> Tensor:
        z, drawn = draw_latents(denoiser, seed, numbers, class_weights=class_weights)
        labels = None if drawn is None else drawn.to(device)
        return heun_sample(lambda x, sigma: denoiser(x, sigma.expand(len(x)), labels), z.to(device), num_steps)

    return sample


def _check_eval(denoiser: nn.Module) -> None:
    if denoiser.training:
        raise ValueError("the denoiser is in train mode: its dropout would be measured too; call .eval() first")
