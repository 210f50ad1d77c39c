"""The built-in teacher: a small DDPM++ denoiser of scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sid_ray.diffusion.denoiser import EDMDenoiser
from sid_ray.diffusion.generator import one_hot
from sid_ray.diffusion.noise import edm_weight, lognormal_sigma
from sid_ray.errors import UserError

NUM_CLASSES = 10
NETWORK: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": NUM_CLASSES,
    "model_type": "SongUNet",
    "augment_dim": 9,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "channel_mult_emb": 4,
    "num_blocks": 2,
    "attn_resolutions": [4],
    "dropout": 0.10,
}
"""Arguments of `EDMDenoiser`: DDPM++ with 260,497 parameters. `augment_dim` 9 leaves room for EDM's augmentation
labels, which the fake score may learn later; the teacher itself is trained without augmentation."""


def digits_images() -> tuple[Tensor, Tensor]:
    """Images uint8 (1797, 1, 8, 8) in 0..255 and class indices int64 (1797,) in 0..9.

    Source: scikit-learn's `load_digits`, the test set of UCI's "Optical Recognition of Handwritten Digits" (1998).
    Its levels v = 0..16 become x = v/8 - 1 in [-1, 1], quantised as every generated image is (x 127.5 + 128,
    clipped to 0..255 and truncated), so that real and generated images meet in one convention.
    UserError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits data come with scikit-learn, which is missing: pip install 'sid-ray[digits]'"
        ) from error
    data = load_digits()
    levels = torch.from_numpy(data.images).float()
    images = ((levels / 8 - 1) * 127.5 + 128).clip(0, 255).to(torch.uint8)
    return images[:, None], torch.from_numpy(data.target).long()


def to_unit_range(images: Tensor) -> Tensor:
    """Images uint8 0..255 as float32 in [-1, 1] (EDM's convention, x = v/127.5 - 1)."""
    return images.float() / 127.5 - 1


def build_denoiser() -> EDMDenoiser:
    """The digits network with fresh weights from torch's global generator."""
    denoiser = EDMDenoiser(**NETWORK)
    # Augmentation labels are never seen here; random weights would make them noise for whoever trains on.
    nn.init.zeros_(denoiser.model.map_augment.weight)
    return denoiser


def denoising_loss(denoiser: EDMDenoiser, images: Tensor, labels: Tensor | None) -> Tensor:
    """EDM's loss (equations 5-8 of arXiv 2206.00364), averaged over images and pixels; noise from the global generator.

    `images`: float (N, C, H, W) in [-1, 1]; `labels`: one-hot (N, label_dim) or None.
    """
    sigma = lognormal_sigma(torch.randn(len(images)))
    noisy = images + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(images)
    error = (denoiser(noisy, sigma, labels) - images).square()
    return (error * edm_weight(sigma, denoiser.sigma_data).reshape(-1, 1, 1, 1)).mean()


def learning_rate(nimg: int, total: int, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up over the first `warmup` of all images, then half a cosine down to zero at `total`."""
    done = nimg / total
    if done < warmup:
        return peak * (done / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, nimg: int, batch: int, halflife_kimg: float) -> None:
    """Move the averaged parameters towards the model's; the half-life ramps up as 5 % of `nimg` (EDM's rule)."""
    halflife = max(min(halflife_kimg * 1000, 0.05 * nimg), 1e-8)
    weight = 1 - 0.5 ** (batch / halflife)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


def shuffled_batches(num: int, batch: int) -> Iterator[Tensor]:
    """Index batches (batch,) without end, every image once per epoch, order from the global generator."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(num)])
        yield order[:batch]
        order = order[batch:]


def train_teacher(
    images: Tensor,
    labels: Tensor,
    *,
    kimg: float,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    ema_halflife_kimg: float = 20.0,
    report_every: int = 10_000,
    report: Callable[[int, float], None] = lambda nimg, loss: None,
) -> EDMDenoiser:
    """Train a class-conditional denoiser of digits and return its averaged (EMA) weights, frozen, in eval mode.

    `images`: uint8 (N, 1, 8, 8); `labels`: class indices (N,). `kimg`: thousands of images to show. `report` is
    called with the images shown so far and their mean loss about every `report_every` images. The same arguments
    give the same weights, bitwise at the same number of threads; torch's global generator is left as it was.
    """
    total = max(round(kimg * 1000), 1)
    data, targets = to_unit_range(images), one_hot(labels, NUM_CLASSES)
    assert targets is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = build_denoiser().train()
        ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=lr)
        losses: list[Tensor] = []
        nimg = 0
        for chosen in shuffled_batches(len(data), batch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(nimg + batch, total + batch, lr)
            optimizer.zero_grad(set_to_none=True)
            loss = denoising_loss(denoiser, data[chosen], targets[chosen])
            loss.backward()
            optimizer.step()
            update_ema(ema, denoiser, nimg, batch, ema_halflife_kimg)
            nimg += batch
            losses.append(loss.detach())
            if len(losses) * batch >= report_every or nimg >= total:
                report(nimg, float(torch.stack(losses).mean()))
                losses = []
            if nimg >= total:
                break
    return ema
