"""What a network costs, counted without running it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from sid_ray.diffusion.denoiser import Denoiser


def network_cost(denoiser: Denoiser) -> tuple[int, int]:
    """(parameters, floating-point operations of one forward pass of one image).

    An addition and a multiplication count as one each; torch counts those of matrix products, convolutions and
    attention, beside which the rest is little. On the meta device nothing is allocated or computed.
    """
    image = torch.empty(1, *denoiser.image_shape, device=next(denoiser.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(image, 1.0)
    return sum(p.numel() for p in denoiser.parameters()), counter.get_total_flops()
