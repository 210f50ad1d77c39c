"""EDM's preconditioned denoiser D(x, sigma) (Karras et al. 2022, arXiv 2206.00364, section 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sid_ray.diffusion.networks import NETWORKS


class EDMDenoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), equation 7 with the coefficients of table 1.

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
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data = sigma_data
        self.augment_dim: int = model_kwargs.get("augment_dim", 0)
        self.model = NETWORKS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.img_channels, self.img_resolution, self.img_resolution

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
