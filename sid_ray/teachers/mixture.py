"""An exact teacher: a Gaussian mixture, whose denoiser is known in closed form.

It is what methods and code are tested with, because nothing about it has to be learned: score, denoiser and samples
are exact at every noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from sid_ray.diffusion.denoiser import Denoiser


class GaussianMixture(Denoiser):
    """D(x; sigma) = E[x0 | x0 + sigma eps = x] for x0 from a mixture of isotropic Gaussians.

    Adding noise leaves it a mixture, of variances v_k = s_k^2 + sigma^2. Given x, component k has probability r_k(x),
    the softmax of log w_k + log N(x; mu_k, v_k I), and then mean mu_k + s_k^2 / v_k (x - mu_k); D is the average of
    those means. It has no parameters, is computed in float64 and is differentiable in x.

    `means`: (K, d) points, or (K, C, H, W) images. `stds`: one number or (K,). `weights`: (K,), equal if left out.
    `image_shape`: (d, 1, 1) for points unless it says otherwise. `classes`: the class 0..L-1 of each component; with
    labels, D is that of the class's components alone. ValueError for shapes that do not fit or impossible values.
    """

    means: Tensor
    """(K, d), float64."""
    variances: Tensor
    """(K,)."""
    log_weights: Tensor
    """(K,)."""
    membership: Tensor
    """(label_dim, K): 1 where a component belongs to a class; (0, K) without classes."""

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds: Tensor | Sequence[float] | float,
        weights: Tensor | Sequence[float] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        classes: Sequence[int] | None = None,
    ):
        super().__init__()
        centres = torch.as_tensor(means, dtype=torch.float64)
        number = len(centres)
        shape = tuple(centres.shape[1:]) if image_shape is None else image_shape
        c, h, w = shape if len(shape) == 3 else (prod(shape), 1, 1)
        self.image_shape = (c, h, w)
        deviations = torch.as_tensor(stds, dtype=torch.float64).expand(number)
        shares = torch.ones(number) if weights is None else torch.as_tensor(weights)
        if centres.numel() != number * prod(self.image_shape) or shares.shape != (number,):
            raise ValueError(
                f"means {tuple(centres.shape)} and weights {tuple(shares.shape)} are no mixture of "
                f"{number} images of shape {self.image_shape}"
            )
        if not (bool((deviations >= 0).all()) and bool((shares > 0).all()) and bool(centres.isfinite().all())):
            raise ValueError("means must be finite, stds at least 0, and weights above 0")
        membership = torch.zeros(0, number)
        if classes is not None:
            if len(classes) != number or sorted(set(classes)) != list(range(max(classes) + 1)):
                raise ValueError(f"classes: expected {number} indices that use every class from 0 on, got {classes}")
            membership = torch.nn.functional.one_hot(torch.tensor(classes)).T
        self.label_dim = len(membership)
        shares = shares.double() / shares.sum()
        flat = centres.flatten(1)
        self.register_buffer("means", flat)
        self.register_buffer("variances", deviations.square())
        self.register_buffer("log_weights", shares.log())
        self.register_buffer("membership", membership.double())
        spread = (shares @ (flat - shares @ flat).square()).mean() + shares @ self.variances
        self.sigma_data = float(spread.sqrt())

    def _apply(self, fn: Callable, recurse: bool = True) -> GaussianMixture:
        # A run in bf16 casts its networks; a rounded mixture would be another one.
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            self.register_buffer(name, buffer.to(self.get_buffer(name).device))
        return self

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The denoised images, float32 (N, C, H, W); `sigma` a number or (N,), `class_labels` (N, label_dim)."""
        return self.posterior_mean(x, sigma, class_labels).float()

    def posterior_mean(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """E[x0 | x] in float64, of the shape of `x`."""
        points, variances, joint = self._components(x, sigma, class_labels)
        responsibilities = joint.softmax(dim=1)
        shrinkage = self.variances / variances  # (N, K)
        pulled = responsibilities * shrinkage
        mean = (responsibilities - pulled) @ self.means + pulled.sum(1, keepdim=True) * points
        return mean.reshape(x.shape)

    def log_density(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """log p_sigma(x), the density of noised images, float64 (N,). Its gradient is the score."""
        return self._components(x, sigma, class_labels)[2].logsumexp(dim=1)

    def _components(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points (N, d), noised variances (N, K) and log joint densities of point and component (N, K)."""
        points = x.double().flatten(1)
        noise = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1)
        variances = self.variances + noise.square()
        squared = (points[:, None] - self.means).square().sum(2)
        density = -0.5 * (squared / variances + points.shape[1] * (2 * torch.pi * variances).log())
        return points, variances, self._log_prior(len(points), class_labels) + density

    def _log_prior(self, number: int, class_labels: Tensor | None) -> Tensor:
        """log probability of each component (N, K); None and rows of zeros mean every class."""
        if class_labels is None or not self.label_dim:
            return self.log_weights.expand(number, -1)
        within = class_labels.double() @ self.membership
        within = torch.where(within.sum(1, keepdim=True) > 0, within, 1.0)
        return (self.log_weights + within.log()).log_softmax(dim=1)

    def sample(self, num: int, seed: int = 0, class_labels: Tensor | Sequence[int] | None = None) -> Tensor:
        """Draw from the mixture itself: float32 (num, C, H, W) on the CPU. `class_labels`: indices (num,)."""
        rng = torch.Generator().manual_seed(seed)
        labels = None
        if class_labels is not None:
            labels = torch.nn.functional.one_hot(torch.as_tensor(class_labels), self.label_dim).to(self.means.device)
        prior = self._log_prior(num, labels).exp().cpu()
        chosen = torch.multinomial(prior, 1, generator=rng).squeeze(1)
        noise = torch.randn(num, self.means.shape[1], generator=rng, dtype=torch.float64)
        points = self.means.cpu()[chosen] + self.variances.cpu()[chosen].sqrt()[:, None] * noise
        return points.float().reshape(num, *self.image_shape)
