"""The three networks of SiD on one worker, set up as the configuration says."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.training.distributed import World
from sid_ray.training.engines import TrainedNetwork, destroy_engine, wrap_frozen
from sid_ray.training.memory import keep_freed_memory


@dataclass
class Networks:
    """The three networks of SiD on one worker."""

    teacher: nn.Module
    """Frozen, in the run's precision."""
    generator: TrainedNetwork
    fake_score: TrainedNetwork
    plain: Denoiser
    """An ordinary float32 network of the generator's architecture, for evaluating averages."""
    teacher_engine: Any = None
    """DeepSpeed's engine around the teacher at ZeRO-3."""

    def destroy(self) -> None:
        """Let go of DeepSpeed's hooks and buffers, so that the memory of all networks can be freed."""
        self.generator.destroy()
        self.fake_score.destroy()
        if self.teacher_engine is not None:
            destroy_engine(self.teacher_engine)


def build_networks(
    config: Config,
    world: World,
    slots_per_rank: int,
    teacher: Denoiser,
    generator: Denoiser,
    fake_score: Denoiser,
) -> Networks:
    """Engines for generator and fake score, and the teacher beside them; all ranks together.

    The given modules are taken over. `generator` and `fake_score` hold their initial float32 weights.
    """
    if world.device.type == "cpu":
        keep_freed_memory()
    dtype = torch.bfloat16 if config.engine.bf16 else torch.float32
    plain = copy.deepcopy(generator).to(world.device).eval().requires_grad_(False)
    for network in (teacher, generator, fake_score):
        set_up_computing(network, config)
    teacher = teacher.to(world.device, dtype).eval().requires_grad_(False)
    teacher_engine = None
    if config.engine.zero_stage == 3 and any(True for _ in teacher.parameters()):
        teacher_engine = wrap_frozen(teacher, config, world, slots_per_rank)
    for network in (generator, fake_score):
        if config.method.dropout is not None:
            network.set_dropout(config.method.dropout)
        network.to(world.device, torch.float32).train().requires_grad_(True)
    beta1 = config.optimizer.generator_beta1
    networks = Networks(
        teacher=teacher if teacher_engine is None else teacher_engine.module,
        generator=TrainedNetwork(generator, config, world, slots_per_rank, beta1=beta1, ema=True),
        fake_score=TrainedNetwork(fake_score, config, world, slots_per_rank, beta1=0.0, ema=False),
        plain=plain,
        teacher_engine=teacher_engine,
    )
    if config.engine.compile:
        for module in (networks.teacher, networks.generator.module, networks.fake_score.module):
            compile_in_place(module)
    return networks


def set_up_computing(network: Denoiser, config: Config) -> None:
    """The switches of `engine` that say how a network is computed, not what; before an engine takes it over."""
    if config.engine.activation_checkpointing:
        network.set_activation_checkpointing(True)
    if config.engine.channels_last:
        # The layout follows from the images; DeepSpeed could not even broadcast weights that are laid out so.
        network.register_forward_pre_hook(_channels_last)


def compile_in_place(network: nn.Module) -> None:
    """torch.compile. Random numbers are drawn as without it, so that a rebuilt forward pass sees the same masks."""
    # Three networks share their code, and each is called in several modes.
    torch._dynamo.config.recompile_limit = 64
    network.compile(dynamic=False, options={"fallback_random": True})


def _channels_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *rest = inputs
    return images.contiguous(memory_format=torch.channels_last), *rest
