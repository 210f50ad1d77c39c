"""Score identity Distillation (Zhou et al. 2024, arXiv 2404.04057) as pure functions.

Notation of the paper: x a generated image, x_t = x + sigma eps, phi = f_phi(x_t) the teacher's and
psi = f_psi(x_t) the fake score's denoised image. The fake score learns to denoise generated images; the
generator descends

    L = sum[ (phi - psi) ((phi - x) - alpha (phi - psi)) / W ] scale,    W = mean |x - phi| per image, fixed,

with gradient flowing through both (frozen) networks to x. That loss may be negative and tells nothing about
progress. Its gradient at the images has a closed form of two vector-Jacobian products, so the method needs
no second graph of the generator and knows nothing of engines: a method is a gradient field at the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sid_ray.diffusion.noise import edm_weight, karras_sigma

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t (N, C, H, W), sigma (N,)) -> denoised images, float32; labels are already bound."""

Memory = Literal["fast", "lean", "minimal"]
"""What is kept alive in the generator step; see `generator_gradient`."""


class ImageGradient(NamedTuple):
    """What a method gives the generator: back-propagate `(images * gradient).sum()`."""

    gradient: Tensor
    """dL/dx, float32, of the shape of the images."""
    loss: Tensor
    """L, scalar, for the record only."""


def generator_sigma(uniform: Tensor, tmax: float = 800) -> Tensor:
    """The generator step's noise levels (N,) from draws u in [0, 1): t = u tmax / 1000 on Karras' schedule."""
    return karras_sigma(uniform * (tmax / 1000))


def fake_score_loss(
    images: Tensor, sigma: Tensor, noise: Tensor, fake_score: Denoise, scale: float = 1.0, sigma_data: float = 0.5
) -> Tensor:
    """Denoising loss of the fake score on generated images (paper, equation 7 with EDM's weight).

    sum[ lambda(sigma) (f_psi(x + sigma eps) - x)^2 ] scale; `images` (N, C, H, W) carry no gradient,
    `sigma` (N,), `noise` unit normals like the images, `sigma_data` their standard deviation. Returns a scalar.
    """
    noised = images + _per_image(sigma) * noise
    squared_error = (fake_score(noised, sigma) - images).square()
    return (_per_image(edm_weight(sigma, sigma_data)) * squared_error).sum() * scale


def generator_gradient(
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    teacher: Denoise,
    fake_score: Denoise,
    *,
    alpha: float,
    scale: float = 1.0,
    memory: Memory = "fast",
) -> ImageGradient:
    """The gradient dL/dx of SiD's generator loss at the images (paper, equation 23, in closed form).

    Holding W fixed and with s = scale / W,

        a = dL/dphi = [(phi - x) + (1 - 2 alpha)(phi - psi)] s
        b = dL/dpsi = [-(phi - x) + 2 alpha (phi - psi)] s
        c = explicit dL/dx = -(phi - psi) s                          (a + b + c = 0)
        dL/dx = J_phi^T a + J_psi^T b + c.

    Both networks must be frozen (parameters without gradient) and in eval mode. `memory="fast"` holds both
    networks' graphs at once; `"lean"` and `"minimal"` one at a time, for one more forward of the fake score
    (what distinguishes `minimal` is the caller's: it rebuilds the generator's own graph afterwards). All
    agree to rounding.
    """
    images, sigmas = images.detach(), _per_image(sigma)
    noised = (images + sigmas * noise).requires_grad_()
    if memory == "fast":
        phi, psi = teacher(noised, sigma), fake_score(noised, sigma)
        a, b, c, loss = _loss_gradients(images, phi.detach(), psi.detach(), alpha, scale)
        (through_networks,) = torch.autograd.grad((phi, psi), noised, (a, b))
        return ImageGradient(through_networks + c, loss)
    with torch.no_grad():
        psi = fake_score(noised, sigma)
    phi = teacher(noised, sigma)
    a, b, c, loss = _loss_gradients(images, phi.detach(), psi, alpha, scale)
    (through_teacher,) = torch.autograd.grad(phi, noised, a)
    del phi, psi, a
    (through_fake_score,) = torch.autograd.grad(fake_score(noised, sigma), noised, b)
    return ImageGradient(through_teacher + through_fake_score + c, loss)


def _loss_gradients(
    x: Tensor, phi: Tensor, psi: Tensor, alpha: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dphi, dL/dpsi, explicit dL/dx and L itself, from the denoised images."""
    weight = scale / (x - phi).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
    gap, residual = phi - psi, phi - x
    a = (residual + (1 - 2 * alpha) * gap) * weight
    b = (2 * alpha * gap - residual) * weight
    c = -gap * weight
    loss = (gap * (residual - alpha * gap) * weight).sum()
    return a, b, c, loss


def _per_image(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
