"""A teacher and a student of one's own: eight Gaussians on a circle, and a small dense network.

In this folder, `sid-ray distill mixture.yaml` names both by `python:mixture:teacher` and `python:mixture:student`;
`python mixture.py` hands the objects over instead.
"""

import math

import torch
from torch import Tensor, nn

from sid_ray import Denoiser, GaussianMixture, distill, load_generator


class PointMLP(Denoiser):
    """A denoiser of points in the plane, preconditioned as EDM does it (arXiv 2206.00364, table 1)."""

    image_shape = (2, 1, 1)
    sigma_data = 0.5

    def __init__(self, width: int = 128, frequencies: int = 8):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, frequencies + 1).float())
        self.layers = nn.Sequential(
            nn.Linear(2 + 2 * frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Denoised points (N, 2, 1, 1) of noisy ones, `sigma` (N,)."""
        points, sigma = x.flatten(1), sigma.reshape(-1, 1)
        variance = sigma**2 + self.sigma_data**2
        angle = (sigma.log() / 4) * self.frequencies
        features = torch.cat([points / variance.sqrt(), angle.cos(), angle.sin()], dim=1)
        output = self.layers(features.to(self.layers[0].weight.dtype)).float()
        denoised = self.sigma_data**2 / variance * points + sigma * self.sigma_data / variance.sqrt() * output
        return denoised.reshape(x.shape)


def teacher() -> GaussianMixture:
    """Eight Gaussians, evenly spaced on a circle of radius 0.7."""
    angles = [2 * math.pi * k / 8 for k in range(8)]
    return GaussianMixture([(0.7 * math.cos(a), 0.7 * math.sin(a)) for a in angles], stds=0.1)


def student() -> PointMLP:
    """A network of 36,000 parameters with weights of its own; the run fits it to the teacher first."""
    torch.manual_seed(0)
    return PointMLP()


if __name__ == "__main__":
    result = distill("mixture.yaml", {"run.name": "mixture-from-python"}, teacher=teacher(), student=student())
    generator = load_generator(result.generator, network=PointMLP())
    print(generator.sample(5).flatten(1))
