"""Noise levels: how training draws them and how samplers step through them."""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
"""EDM's range of noise levels and the curvature of its schedule (table 1)."""


def karras_sigma(t: Tensor) -> Tensor:
    """Noise level at t in [0, 1]: t = 0 gives sigma_min 0.002, t = 1 gives sigma_max 80.

    EDM equation 5 with the index running upwards, as SiD uses it to draw the generator's noise levels.
    """
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (high + (1 - t) * (low - high)) ** RHO


def karras_steps(num_steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Decreasing noise levels of a sampler, float64, shape (num_steps + 1,), ending in 0 (EDM equation 5)."""
    index = torch.arange(num_steps, dtype=torch.float64, device=device)
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    sigma = (high + index / max(num_steps - 1, 1) * (low - high)) ** RHO
    return torch.cat([sigma, sigma.new_zeros(1)])


def lognormal_sigma(normal: Tensor, p_mean: float = -1.2, p_std: float = 1.2) -> Tensor:
    """ln(sigma) ~ N(p_mean, p_std^2) from unit normals: the denoising loss's noise levels (EDM table 1)."""
    return (normal * p_std + p_mean).exp()


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2: the denoising loss's weight (EDM table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
