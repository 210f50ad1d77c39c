"""Denoisers D(x, sigma): what the project asks of one, and EDM's own (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sid_ray.diffusion.networks import NETWORKS
from sid_ray.diffusion.networks.layers import UNetBlock


class Denoiser(nn.Module):
    """What teacher, fake score and generator are: a module with these attributes, called like this.

    Own modules derive from it, or merely have the attributes; parameters are known by their names alone.
    `forward(x, sigma, class_labels=None)`: noisy images `x` (N, C, H, W) float32 in the units of the images, `sigma`
    (N,) float32, `class_labels` one-hot (N, label_dim), or None for no class; returns the denoised images, float32, of
    the shape of `x`. With an `augment_dim`, also `augment_labels` (N, augment_dim), or None for none.
    """

    image_shape: tuple[int, int, int]
    """(channels, height, width) of one image; points are images of (dimensions, 1, 1)."""
    label_dim: int = 0
    """Number of classes; 0 for an unconditional network."""
    sigma_data: float = 0.5
    """Standard deviation of the images, which the denoising loss is weighted by."""
    augment_dim: int = 0
    """Number of augmentation labels; 0 if it takes none."""

    def set_dropout(self, probability: float) -> None:
        """Set the probability of every dropout layer."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether backward passes compute the activations inside of blocks again. ValueError if there are no blocks."""
        blocks = [module for module in self.modules() if isinstance(module, UNetBlock)]
        if on and not blocks:
            raise ValueError(f"{type(self).__name__} has no blocks whose activations could be computed again")
        for block in blocks:
            block.recompute = on


class EDMDenoiser(Denoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), equation 7 of the paper with the coefficients of table 1.

    Preconditioning and output are float32 whatever the precision of the network F, because the score is a
    difference of denoiser outputs divided by sigma^2.

    Arguments are EDM's own, so that an EDM checkpoint's `init_kwargs` builds it: `model_type` names the
    network and `model_kwargs` are passed to it. An unknown architecture raises ValueError.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = 0.5,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__()
        if model_type not in NETWORKS:
            raise ValueError(f"unknown network {model_type!r}; allowed: {', '.join(NETWORKS)}")
        self.image_shape = (img_channels, img_resolution, img_resolution)
        self.label_dim, self.sigma_data = label_dim, sigma_data
        self.augment_dim = model_kwargs.get("augment_dim", 0)
        self.model = NETWORKS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Denoised images, float32 in about [-1, 1], of the shape of `x` (N, C, H, W).

        `sigma`: noise level, a number or (N,), in the units of `x`. `class_labels`: one-hot (N, label_dim).
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        variance = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = (sigma.log() / 4).flatten().expand(len(x))
        dtype = self.model.map_layer0.weight.dtype
        output = self.model((c_in * x).to(dtype), c_noise, class_labels, augment_labels)
        return c_skip * x + c_out * output.float()
