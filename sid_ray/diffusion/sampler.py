"""EDM's deterministic sampler (Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sid_ray.diffusion.noise import karras_steps


@torch.no_grad()
def heun_sample(denoiser: Callable[[Tensor, Tensor], Tensor], latents: Tensor, num_steps: int = 18) -> Tensor:
    """Integrate dx/dsigma = (x - D(x; sigma)) / sigma from sigma 80 to 0 with Heun's second-order method.

    `denoiser`: (x, sigma) -> denoised, labels already bound. `latents`: unit normals (N, C, H, W). Costs
    2 num_steps - 1 denoiser evaluations (35 for the default). Returns float32 images, about [-1, 1].
    """
    steps = karras_steps(num_steps, latents.device)

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoiser(x.float(), sigma.float()).double()) / sigma

    x = latents.double() * steps[0]
    for sigma, following in pairwise(steps):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        last = following == 0
        x = euler if last else x + (following - sigma) * (first + slope(euler, following)) / 2
    return x.float()
