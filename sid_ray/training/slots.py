"""Slots: how the global batch is cut, and where every random number of a run comes from.

The global batch is cut into slots of `micro_batch` images; a slot is what one forward pass sees. Before each
slot of each phase the random generators are seeded from (seed, rollbacks, nimg, phase, slot), so that
latents, labels, noise and dropout masks do not depend on the number of workers, and a resumed run or a
rebuilt forward pass draws the same numbers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import draw_classes, one_hot
from sid_ray.diffusion.noise import lognormal_sigma
from sid_ray.methods.sid import generator_sigma


class Phase(IntEnum):
    """What random numbers are drawn for; part of the seed, so the values are fixed."""

    FAKE_SCORE_DRAWS = 1
    FAKE_SCORE_DROPOUT = 2
    GENERATOR_DRAWS = 3
    GENERATOR_DROPOUT = 4
    AUGMENTATION = 5
    FIT = 6


class Slot(NamedTuple):
    """One forward pass of one worker."""

    number: int
    """Which part of the global batch."""
    weight: float
    """1, or 0 for a surplus pass that only keeps the workers' collectives in step."""


def slots_of_rank(num_slots: int, rank: int, world_size: int) -> list[Slot]:
    """The ceil(num_slots / world_size) slots of a rank; surplus ones repeat slot 0 with weight 0."""
    passes = -(-num_slots // world_size)
    indices = [turn * world_size + rank for turn in range(passes)]
    return [Slot(i, 1.0) if i < num_slots else Slot(0, 0.0) for i in indices]


class Draws(NamedTuple):
    """The random inputs of one slot in one phase."""

    z: Tensor
    """Unit-normal latents (n, C, H, W)."""
    class_labels: Tensor | None
    """One-hot (n, label_dim), or None."""
    sigma: Tensor
    """Noise levels (n,)."""
    noise: Tensor
    """Unit normals (n, C, H, W)."""


class DrawSource(Protocol):
    """Where a step takes its randomness from; tests replay recorded draws through it."""

    def fake_score(self, nimg: int, slot: int) -> Draws:
        """Inputs of the fake-score step."""
        ...

    def generator(self, nimg: int, slot: int) -> Draws:
        """Inputs of the generator step."""
        ...

    def reseed(self, nimg: int, phase: Phase, slot: int) -> None:
        """Make the next forward pass in train mode draw the masks that belong to it."""
        ...


def reseed(seed: int, rollbacks: int, nimg: int, phase: Phase, slot: int) -> None:
    """Seed torch's global generators for one slot of one phase."""
    entropy = (seed, rollbacks, nimg, int(phase), slot)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))


@dataclass(frozen=True)
class SeededDraws:
    """Draws that are a pure function of (seed, rollbacks, nimg, phase, slot); see `DrawSource`."""

    denoiser: Denoiser
    micro_batch: int
    seed: int
    rollbacks: int
    p_mean: float
    p_std: float
    tmax: float
    device: torch.device
    class_weights: Sequence[float] | None = None
    """How often each class is drawn; None: all alike."""

    @classmethod
    def of(cls, config: Config, denoiser: Denoiser, rollbacks: int, device: torch.device) -> SeededDraws:
        """The draws of a run."""
        return cls(
            denoiser=denoiser,
            micro_batch=config.micro_batch,
            seed=config.run.seed,
            rollbacks=rollbacks,
            p_mean=config.method.p_mean,
            p_std=config.method.p_std,
            tmax=config.method.tmax,
            device=device,
            class_weights=config.method.class_weights,
        )

    def fake_score(self, nimg: int, slot: int) -> Draws:
        """Noise levels are log-normal (EDM)."""
        z, labels = self._seeded_latents(nimg, Phase.FAKE_SCORE_DRAWS, slot)
        sigma = lognormal_sigma(torch.randn(self.micro_batch, device=self.device), self.p_mean, self.p_std)
        return Draws(z, labels, sigma, torch.randn_like(z))

    def generator(self, nimg: int, slot: int) -> Draws:
        """Noise levels are uniform in time (SiD)."""
        z, labels = self._seeded_latents(nimg, Phase.GENERATOR_DRAWS, slot)
        sigma = generator_sigma(torch.rand(self.micro_batch, device=self.device), self.tmax)
        return Draws(z, labels, sigma, torch.randn_like(z))

    def reseed(self, nimg: int, phase: Phase, slot: int) -> None:
        """Seed torch's global generators, which dropout draws from."""
        reseed(self.seed, self.rollbacks, nimg, phase, slot)

    def _seeded_latents(self, nimg: int, phase: Phase, slot: int) -> tuple[Tensor, Tensor | None]:
        self.reseed(nimg, phase, slot)
        z = torch.randn(self.micro_batch, *self.denoiser.image_shape, device=self.device)
        label_dim = self.denoiser.label_dim
        classes = draw_classes((self.micro_batch,), label_dim, self.class_weights, device=self.device)
        return z, one_hot(classes, label_dim)
