"""What a network costs, counted without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sid_ray.diffusion.denoiser import EDMDenoiser


def network_cost(network: dict[str, Any]) -> tuple[int, int]:
    """(parameters, floating-point operations of one forward pass of one image) of `EDMDenoiser(**network)`.

    An addition and a multiplication count as one each; torch counts those of matrix products, convolutions and
    attention, beside which the rest is little. Nothing is allocated or computed.
    """
    with torch.device("meta"):
        denoiser = EDMDenoiser(**network).eval()
        image = torch.empty(1, *denoiser.image_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(image, 1.0)
    return sum(p.numel() for p in denoiser.parameters()), counter.get_total_flops()
