"""This project's step without DeepSpeed: what the engines are measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.training.optimizer import AdamWithEMA
from sid_ray.training.rehearsal import StandIn, StandIns
from sid_ray.training.run_directory import RunDirectory, start_of
from sid_ray.training.slots import SeededDraws, Slot
from sid_ray.training.step import Iteration


@dataclass
class PlainNetwork(StandIn):
    """A network that learns, with an optimizer and no engine; float32."""

    adam: AdamWithEMA
    slots: int
    seen: int = 0

    def step(self) -> None:
        """Advance by one slot; update at the last."""
        self.seen += 1
        if self.seen % self.slots == 0:
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

    def set_rates(self, lr: float, ema_beta: float | None = None) -> None:
        """Rates of the next step."""
        for group in self.adam.param_groups:
            group["lr"] = lr
            group["ema_beta"] = ema_beta


def plain_iteration(config: Config) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The iteration of a configuration in float32 on one worker, without DeepSpeed."""
    teacher = start_of(config, RunDirectory.of(config)).teacher()[0].eval().requires_grad_(False)
    networks = StandIns(teacher, _learner(teacher, config, ema=True), _learner(teacher, config, ema=False))
    draws = SeededDraws.of(config, teacher, 0, torch.device("cpu"))
    return Iteration(config, networks, draws, [Slot(i, 1.0) for i in range(config.num_slots)])


def _learner(teacher: Denoiser, config: Config, *, ema: bool) -> PlainNetwork:
    network = copy.deepcopy(teacher).train().requires_grad_(True)
    if config.method.dropout is not None:
        network.set_dropout(config.method.dropout)
    betas = (config.optimizer.generator_beta1 if ema else 0.0, 0.999)
    adam = AdamWithEMA(network.parameters(), lr=0.0, betas=betas, eps=config.adam_eps, ema=ema)
    return PlainNetwork(network, adam, config.num_slots)
