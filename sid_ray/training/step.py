"""One iteration of SiD on one worker: fake-score step, then generator step (notation of `methods.sid`)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sid_ray.config import Config
from sid_ray.diffusion.augment import augment
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import generate
from sid_ray.methods.sid import Denoise, fake_score_loss, generator_gradient
from sid_ray.training.phases import phase
from sid_ray.training.schedules import ema_beta, learning_rates
from sid_ray.training.slots import Draws, DrawSource, Phase, Slot


class StepLosses(NamedTuple):
    """This rank's share of the two losses; on the device, not synchronised."""

    fake_score: Tensor
    generator: Tensor


class Learner(Protocol):
    """What a step asks of a network that learns; `engines.TrainedNetwork` says more."""

    @property
    def module(self) -> Denoiser:
        """The network, to be called for every forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        ...

    def step(self) -> None:
        """Advance by one slot."""
        ...

    def set_rates(self, lr: float, ema_beta: float | None = None) -> None:
        """Rates of the next step."""
        ...

    def frozen(self) -> AbstractContextManager[Denoiser]:
        """The module with parameters that take no gradient."""
        ...


class Trio(Protocol):
    """The three networks of SiD; `networks.Networks`, or what stands in for it."""

    @property
    def teacher(self) -> nn.Module:
        """Frozen."""
        ...

    @property
    def generator(self) -> Learner:
        """The one-step generator."""
        ...

    @property
    def fake_score(self) -> Learner:
        """The score of what the generator makes."""
        ...


@dataclass(frozen=True)
class Iteration:
    """The work of one iteration, ready to run at any image count."""

    config: Config
    networks: Trio
    draws: DrawSource
    slots: list[Slot]

    def __call__(self, nimg: int) -> StepLosses:
        """Run the iteration that starts at `nimg` images."""
        self._set_rates(nimg)
        with phase("generator step"):
            shared = [self._shared_images(nimg, slot) for slot in self.slots] if self._shares_latents else None
        with phase("fake-score step"):
            fake_score = [self._fake_score_slot(nimg, i, shared) for i in range(len(self.slots))]
        with phase("generator step"):
            generator = [self._generator_slot(nimg, i, shared) for i in range(len(self.slots))]
        return StepLosses(torch.stack(fake_score).sum(), torch.stack(generator).sum())

    @property
    def _shares_latents(self) -> bool:
        return self.config.method.latents == "shared"

    def _set_rates(self, nimg: int) -> None:
        o = self.config.optimizer
        generator_lr, fake_score_lr = learning_rates(self.config, nimg)
        beta = ema_beta(self.config.batch.size, nimg, o.ema_halflife_kimg, o.ema_rampup_ratio)
        self.networks.fake_score.set_rates(fake_score_lr)
        self.networks.generator.set_rates(generator_lr, beta)

    def _shared_images(self, nimg: int, slot: Slot) -> tuple[Draws, Tensor]:
        """Latents, labels and images (with the generator's graph) that serve both steps."""
        with phase("data"):
            draw = self.draws.generator(nimg, slot.number)
        return draw, self._images_with_graph(nimg, slot, draw)

    def _images_with_graph(self, nimg: int, slot: Slot, draw: Draws) -> Tensor:
        self.draws.reseed(nimg, Phase.GENERATOR_DROPOUT, slot.number)
        return generate(self.networks.generator.module.train(), draw.z, self._sigma_init, draw.class_labels)

    def _fake_score_slot(self, nimg: int, i: int, shared: list[tuple[Draws, Tensor]] | None) -> Tensor:
        """The fake score learns to denoise what the generator makes now."""
        slot, fake_score, method = self.slots[i], self.networks.fake_score, self.config.method
        with phase("data"):
            draw = self.draws.fake_score(nimg, slot.number)
        if shared is None:
            with torch.no_grad():
                generator = self.networks.generator.module.eval()
                images = generate(generator, draw.z, self._sigma_init, draw.class_labels)
            labels = draw.class_labels
        else:
            images, labels = shared[i][1].detach(), shared[i][0].class_labels
        denoise: Denoise = _with_labels(fake_score.module.train(), labels)
        if method.augment > 0:
            with phase("data"):
                self.draws.reseed(nimg, Phase.AUGMENTATION, slot.number)
                images, augment_labels = augment(images, method.augment)
            denoise = partial(fake_score.module, class_labels=labels, augment_labels=augment_labels)
        self.draws.reseed(nimg, Phase.FAKE_SCORE_DROPOUT, slot.number)
        scale = method.loss_scale_fake_score * slot.weight / self.config.batch.size
        loss = fake_score_loss(images, draw.sigma, draw.noise, denoise, scale, fake_score.module.sigma_data)
        fake_score.backward(loss)
        fake_score.step()
        return loss.detach()

    def _generator_slot(self, nimg: int, i: int, shared: list[tuple[Draws, Tensor]] | None) -> Tensor:
        """The generator follows SiD's gradient field at its images."""
        slot, generator, method = self.slots[i], self.networks.generator, self.config.method
        if shared is not None:
            draw, images = shared[i]
        else:
            with phase("data"):
                draw = self.draws.generator(nimg, slot.number)
            with torch.set_grad_enabled(method.memory != "minimal"):
                images = self._images_with_graph(nimg, slot, draw)
        with phase("score gradients"), self.networks.fake_score.frozen() as fake_score:
            field = generator_gradient(
                images,
                draw.sigma,
                draw.noise,
                _with_labels(self.networks.teacher, draw.class_labels),
                _with_labels(fake_score, draw.class_labels),
                alpha=method.alpha,
                scale=method.loss_scale_generator * slot.weight / self.config.batch.size,
                memory=method.memory,
            )
        if method.memory == "minimal":
            images = self._images_with_graph(nimg, slot, draw)
        generator.backward((images * field.gradient).sum())
        generator.step()
        return field.loss

    @property
    def _sigma_init(self) -> float:
        return self.config.method.sigma_init


def _with_labels(denoiser: nn.Module, class_labels: Tensor | None) -> Denoise:
    return partial(denoiser, class_labels=class_labels)
