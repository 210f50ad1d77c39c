"""The one-step generator: a denoiser evaluated once, at one noise level, on pure noise (SiD section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sid_ray.diffusion.constants import constant
from sid_ray.diffusion.denoiser import Denoiser


def generate(denoiser: nn.Module, z: Tensor, sigma_init: float, class_labels: Tensor | None = None) -> Tensor:
    """G(z) = D(sigma_init z; sigma_init): images (N, C, H, W), float32, about [-1, 1], from unit normals `z`."""
    return denoiser(z * sigma_init, z.new_full((len(z),), sigma_init), class_labels)


def one_hot(indices: Tensor, label_dim: int) -> Tensor | None:
    """Class indices (N,) as float one-hot rows (N, label_dim); None for an unconditional network."""
    return torch.nn.functional.one_hot(indices, label_dim).float() if label_dim else None


def draw_classes(
    shape: tuple[int, ...],
    label_dim: int,
    weights: Sequence[float] | None = None,
    *,
    rng: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Class indices of a shape below `label_dim`: all alike, or as often as `weights` (label_dim,) say, in any unit.

    Without classes (`label_dim` 0) they are all 0. Random numbers come from `rng`, else from torch's global generator.
    """
    if weights is None:
        return torch.randint(max(label_dim, 1), shape, generator=rng, device=device)
    frequencies = constant(tuple(weights), torch.float64, device)
    return frequencies.multinomial(math.prod(shape), replacement=True, generator=rng).reshape(shape)


def draw_latents(
    denoiser: Denoiser,
    seed: int,
    indices: range,
    class_labels: Tensor | None = None,
    class_weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Unit-normal latents (n, C, H, W) and one-hot labels (n, label_dim) of the images numbered `indices`.

    Each image has a random generator of its own, seeded by (seed, number), on the CPU: image 17 is the same
    at any batch size, on any device and on any number of workers. `class_labels` fixes the class indices (n,);
    None draws them, by `class_weights` if there are any (`draw_classes`). Labels are None for an unconditional network.
    """
    latents, labels = [], []
    for index in indices:
        rng = torch.Generator().manual_seed((seed * 1_000_003 + index) & (2**63 - 1))
        latents.append(torch.randn(denoiser.image_shape, generator=rng))
        labels.append(draw_classes((), denoiser.label_dim, class_weights, rng=rng))
    drawn = torch.stack(labels) if class_labels is None else class_labels
    return torch.stack(latents), one_hot(drawn, denoiser.label_dim)


class OneStepGenerator(nn.Module):
    """A distilled generator as users hold it: plain module, float32, no training machinery."""

    def __init__(self, denoiser: Denoiser, sigma_init: float, class_weights: Sequence[float] | None = None):
        super().__init__()
        self.denoiser, self.sigma_init = denoiser.eval().requires_grad_(False), sigma_init
        self.class_weights = class_weights

    @property
    def label_dim(self) -> int:
        """Number of classes; 0 for an unconditional generator."""
        return self.denoiser.label_dim

    def forward(self, z: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Images from unit normals `z` (N, C, H, W) and one-hot labels (N, label_dim)."""
        return generate(self.denoiser, z, self.sigma_init, class_labels)

    @torch.no_grad()
    def sample(
        self, num: int, seed: int = 0, class_labels: Tensor | list[int] | None = None, batch: int = 256
    ) -> Tensor:
        """Draw `num` images: float32 (num, C, H, W), about [-1, 1], on the CPU.

        `class_labels`: class indices (num,), or None to draw them as in training. The same seed gives the same
        images (to rounding) at any `batch`. Raises ValueError for labels of a wrong shape, outside the range, or of
        an unconditional model.
        """
        indices = self.check_labels(num, class_labels)
        images = []
        for start in range(0, num, batch):
            part = range(start, min(start + batch, num))
            chosen = None if indices is None else indices[start : part.stop]
            images.append(self.sample_numbers(part, seed, chosen).cpu())
        return torch.cat(images) if images else torch.empty(0, *self.denoiser.image_shape)

    @torch.no_grad()
    def sample_numbers(self, numbers: range, seed: int = 0, class_labels: Tensor | None = None) -> Tensor:
        """The images of these numbers, those that `sample` puts there: float32 (n, C, H, W), on this module's device.

        `class_labels`: checked class indices (n,), or None to draw them.
        """
        device = next(self.parameters()).device
        z, labels = draw_latents(self.denoiser, seed, numbers, class_labels, self.class_weights)
        return self(z.to(device), None if labels is None else labels.to(device))

    def check_labels(self, num: int, class_labels: Tensor | list[int] | None) -> Tensor | None:
        """The class indices (num,) as a tensor; None if they are to be drawn. ValueError if they are not allowed."""
        if class_labels is None:
            return None
        if not self.label_dim:
            raise ValueError("class_labels: this generator is unconditional; leave class_labels out")
        indices = torch.as_tensor(class_labels)
        if indices.shape != (num,) or indices.is_floating_point():
            raise ValueError(f"class_labels: expected {num} class indices, got shape {tuple(indices.shape)}")
        if num and not (int(indices.min()) >= 0 and int(indices.max()) < self.label_dim):
            raise ValueError(f"class_labels: class indices must lie in 0..{self.label_dim - 1}")
        return indices.long()
