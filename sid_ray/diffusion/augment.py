"""Non-leaky geometric augmentation with conditioning labels (EDM, appendix F.2; after Karras et al. 2020).

The network is told what was done to an image, so it can learn from the transformed ones without learning to
make them: with labels of zero it models the images as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_ray.diffusion.constants import constant

LABELS = ("xflip", "yflip", "scale", "rotate_cos", "rotate_sin", "aniso_cos", "aniso_sin", "shift_x", "shift_y")
"""What the 9 conditioning values say, in EDM's order; all are 0 for an image left as it is. Scale, anisotropy and
shifts are in standard deviations."""

SCALE_STD = 0.2
"""Standard deviation of log2 of the scaling, also of the anisotropic one."""
SHIFT_STD = 0.125
"""Standard deviation of a translation, as a share of the width."""

SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""Low-pass filter of Daubechies' least asymmetric wavelet with 6 vanishing moments."""
LAG = (len(SYM6) - 1) / 2 - sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)
"""How far, in pixels of the finer image, the filter's centre of mass lies before its middle."""


class Transforms(NamedTuple):
    """One random transformation per image."""

    xflip: Tensor
    """Whether to mirror left and right, bool (n,)."""
    yflip: Tensor
    """Whether to mirror top and bottom, bool (n,)."""
    inverse: Tensor
    """Where an output pixel comes from, (n, 2, 3), in coordinates of [-1, 1] over the image."""
    labels: Tensor
    """Conditioning values (n, 9), see `LABELS`."""


def draw_transforms(n: int, probability: float, device: torch.device | str = "cpu") -> Transforms:
    """Draw transformations from torch's global generator. Horizontal flips are always drawn (unless the
    probability is 0), every other transformation takes place with `probability`.
    """

    def applies(chance: float = probability) -> Tensor:
        return torch.rand(n, device=device) < chance

    def normal() -> Tensor:
        return torch.randn(n, device=device)

    def angle() -> Tensor:
        return (torch.rand(n, device=device) * 2 - 1) * math.pi

    zero = torch.zeros(n, device=device)
    xflip = applies(0.5) & (probability > 0)
    yflip = applies(0.5) & applies()
    scale = torch.where(applies(), normal(), zero)
    rotation = torch.where(applies(), angle(), zero)
    aniso = torch.where(applies(), normal(), zero)
    direction = torch.where((aniso != 0) & applies(0.5), angle(), zero)
    shifted = applies()
    shift_x, shift_y = (torch.where(shifted, normal(), zero) for _ in range(2))

    # The inverse of: stretch, rotate, scale, then shift, composed from the left.
    size, stretch = (scale * SCALE_STD).exp2(), (aniso * SCALE_STD).exp2()
    inverse = _stretch(size, size)
    inverse = inverse @ _rotate(rotation)
    inverse = inverse @ _rotate(-direction) @ _stretch(stretch, 1 / stretch) @ _rotate(direction)
    inverse = inverse @ _shift(-2 * SHIFT_STD * shift_x, -2 * SHIFT_STD * shift_y)
    labels = [xflip, yflip, scale, rotation.cos() - 1, rotation.sin(), aniso * direction.cos(), aniso * direction.sin()]
    labels += [shift_x, shift_y]
    return Transforms(xflip, yflip, inverse[:, :2], torch.stack([v.float() for v in labels], dim=1))


def augment(images: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Transformed images (n, C, H, H), and the labels (n, 9) that tell a network how.

    Random numbers come from torch's global generator. With probability 0 the images are returned as they are,
    with labels of zero. ValueError for images that are not square.
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"augmentation is for square images, not {tuple(images.shape)}")
    if probability <= 0:
        return images, images.new_zeros(len(images), len(LABELS))
    transforms = draw_transforms(len(images), probability, images.device)
    return apply_transforms(images, transforms), transforms.labels


def apply_transforms(images: Tensor, transforms: Transforms) -> Tensor:
    """Flip exactly, then warp those images that have more to it than a flip."""
    images = torch.where(_per_image(transforms.xflip), images.flip(3), images)
    images = torch.where(_per_image(transforms.yflip), images.flip(2), images)
    untouched = (transforms.labels[:, 2:] == 0).all(dim=1)
    return torch.where(_per_image(untouched), images, warp(images, transforms.inverse))


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resample images (n, C, H, W) at the points `inverse` (n, 2, 3), reflecting them at their edges.

    Between two filters at twice the resolution, so that neither the interpolation nor a reduction aliases.
    """
    n, channels, height, width = images.shape
    fine = resample(images, up=True)
    # The wavelet is not quite symmetric: the finer image lies a little off, and must be read and written there.
    off = constant((LAG / width, LAG / height), torch.float32, images.device)
    linear = inverse[:, :, :2]
    inverse = torch.cat([linear, inverse[:, :, 2:] + linear @ off[:, None] - off[:, None]], dim=2)
    grid = F.affine_grid(inverse, [n, channels, 2 * height, 2 * width], align_corners=False)
    fine = F.grid_sample(fine, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return resample(fine, up=False)


def resample(images: Tensor, up: bool) -> Tensor:
    """Twice or half the resolution through the wavelet's low-pass filter; down undoes up, but for the edges."""
    taps = constant(SYM6, images.dtype, images.device)
    for dim in (2, 3):
        images = _filter_up(images, taps, dim) if up else _filter_down(images, taps, dim)
    return images


def _filter_up(images: Tensor, taps: Tensor, dim: int) -> Tensor:
    """out[k] = sqrt(2) sum_j in[j] taps[k + 6 - 2 j], with mirrored edges."""
    pad = len(taps) // 4
    rows, shape = _rows(_mirror(images, pad, dim), dim)
    out = F.conv_transpose1d(rows, (taps * math.sqrt(2)).view(1, 1, -1), stride=2)
    # The filter's centre lies between its two middle taps, that of a pair of new pixels between them.
    start = 2 * pad + len(taps) // 2 - 1
    out = out[..., start : start + 2 * images.shape[dim]]
    return _unrows(out, shape, dim)


def _filter_down(images: Tensor, taps: Tensor, dim: int) -> Tensor:
    """out[j] = 1 / sqrt(2) sum_k in[k] taps[k + 6 - 2 j], the transpose of `_filter_up` over 2."""
    pad = len(taps) // 2 - 1
    rows, shape = _rows(_mirror(images, pad, dim), dim)
    out = F.conv1d(rows, (taps / math.sqrt(2)).view(1, 1, -1), stride=2)[..., : images.shape[dim] // 2]
    return _unrows(out, shape, dim)


def _mirror(images: Tensor, pad: int, dim: int) -> Tensor:
    """Extend by mirrored pixels, the edge pixel included, however small the image."""
    size = images.shape[dim]
    index = torch.arange(-pad, size + pad, device=images.device) % (2 * size)
    return images.index_select(dim, torch.where(index < size, index, 2 * size - 1 - index))


def _rows(images: Tensor, dim: int) -> tuple[Tensor, torch.Size]:
    moved = images.movedim(dim, 3)
    return moved.reshape(-1, 1, moved.shape[3]), moved.shape


def _unrows(rows: Tensor, shape: torch.Size, dim: int) -> Tensor:
    return rows.reshape(*shape[:3], -1).movedim(3, dim)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _stretch(x: Tensor, y: Tensor) -> Tensor:
    """Inverse of a stretch by x and y."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[1 / x, zero, zero], [zero, 1 / y, zero], [zero, zero, one]])


def _rotate(angle: Tensor) -> Tensor:
    """Rotation by an angle."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    return _matrix([[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero], [zero, zero, one]])


def _shift(x: Tensor, y: Tensor) -> Tensor:
    """Translation."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])
