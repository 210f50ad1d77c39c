"""What a network costs, counted without running it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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


def activation_bytes(denoiser: Denoiser, learns: bool) -> int:
    """Bytes that the graph of one image keeps for its backward pass, in the precision of the parameters.

    `learns`: with gradients of the parameters, in training mode (dropout masks); else of the image alone, as SiD
    goes through its frozen networks. Counted from what autograd saves; parameters are left out. On the meta device
    nothing is allocated or computed. The network's modes are changed.
    """
    denoiser.train(learns).requires_grad_(learns)
    parameters = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    device = next(denoiser.parameters()).device
    image = torch.empty(1, *denoiser.image_shape, device=device, requires_grad=not learns)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        kept_alive = denoiser(image, 1.0)
    del kept_alive
    return sum(storage.nbytes() for storage in saved.values())
