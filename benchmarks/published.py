"""The published SiD iteration in plain PyTorch: what `benchmarks/compare.py` measures this project against.

Written from the paper (Zhou et al. 2024, arXiv 2404.04057) and from its published settings: float32, one autograd graph
through generator, teacher and fake score, Adam without fusing, the average of the generator one parameter at a time,
gradients that are not finite set to zero. No engine, no closed form. It takes the draws of a run of this project, so
that both do the same work on the same numbers; tests/benchmarks/test_published.py shows that the results are the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sid_ray.config import Config
from sid_ray.diffusion.augment import augment
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import generate
from sid_ray.training.slots import DrawSource, Phase


@dataclass
class Published:
    """The four networks, their optimizers, and one iteration."""

    config: Config
    draws: DrawSource
    teacher: Denoiser
    generator: Denoiser
    fake_score: Denoiser

    def __post_init__(self) -> None:
        o = self.config.optimizer
        self.teacher.eval().requires_grad_(False)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        for network in (self.generator, self.fake_score):
            if self.config.method.dropout is not None:
                network.set_dropout(self.config.method.dropout)
        eps = o.eps or 1e-8
        self.generator_adam = torch.optim.Adam(
            self.generator.parameters(), lr=o.generator_lr, betas=(o.generator_beta1, 0.999), eps=eps
        )
        self.fake_score_adam = torch.optim.Adam(
            self.fake_score.parameters(), lr=o.fake_score_lr, betas=(0.0, 0.999), eps=eps
        )

    def __call__(self, nimg: int) -> tuple[Tensor, Tensor]:
        """The iteration that starts at `nimg` images; returns the losses of fake score and generator."""
        fake_score = self._step(self.fake_score, self.fake_score_adam, partial(self._fake_score_loss, nimg))
        generator = self._step(self.generator, self.generator_adam, partial(self._generator_loss, nimg))
        self._average(nimg)
        return fake_score, generator

    def _step(self, network: nn.Module, adam: torch.optim.Adam, loss_of: partial[Tensor]) -> Tensor:
        """One update of a network; slots are accumulated."""
        network.train().requires_grad_(True)
        adam.zero_grad(set_to_none=True)
        losses = []
        for slot in range(self.config.num_slots):
            loss = loss_of(slot)
            loss.backward()
            losses.append(loss.detach())
        network.requires_grad_(False)
        for p in network.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        adam.step()
        return torch.stack(losses).sum()

    def _fake_score_loss(self, nimg: int, slot: int) -> Tensor:
        method, draw = self.config.method, self.draws.fake_score(nimg, slot)
        with torch.no_grad():
            images = generate(self.generator.eval(), draw.z, method.sigma_init, draw.class_labels)
        augment_labels = {}
        if method.augment > 0:
            self.draws.reseed(nimg, Phase.AUGMENTATION, slot)
            images, labels = augment(images, method.augment)
            augment_labels = {"augment_labels": labels}
        self.draws.reseed(nimg, Phase.FAKE_SCORE_DROPOUT, slot)
        sigma, data = draw.sigma.reshape(-1, 1, 1, 1), self.fake_score.sigma_data
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
        denoised = self.fake_score(images + sigma * draw.noise, draw.sigma, draw.class_labels, **augment_labels)
        return (weight * (denoised - images) ** 2).sum() * method.loss_scale_fake_score / self.config.batch.size

    def _generator_loss(self, nimg: int, slot: int) -> Tensor:
        """Gradient flows through teacher and fake score to the images, and on through the generator."""
        method, draw = self.config.method, self.draws.generator(nimg, slot)
        self.draws.reseed(nimg, Phase.GENERATOR_DROPOUT, slot)
        images = generate(self.generator, draw.z, method.sigma_init, draw.class_labels)
        noised = images + draw.sigma.reshape(-1, 1, 1, 1) * draw.noise
        phi = self.teacher(noised, draw.sigma, draw.class_labels)
        psi = self.fake_score.eval()(noised, draw.sigma, draw.class_labels)
        with torch.no_grad():
            weight = (images - phi).abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
        loss = (phi - psi) * ((phi - images) - method.alpha * (phi - psi)) / weight
        return loss.sum() * method.loss_scale_generator / self.config.batch.size

    @torch.no_grad()
    def _average(self, nimg: int) -> None:
        o, batch = self.config.optimizer, self.config.batch.size
        halflife = o.ema_halflife_kimg * 1000
        if o.ema_rampup_ratio is not None:
            halflife = min(halflife, nimg * o.ema_rampup_ratio)
        beta = 0.5 ** (batch / max(halflife, 1e-8))
        for average, p in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            average.copy_(p.lerp(average, beta))
