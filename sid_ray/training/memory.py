"""The memory of a worker, predicted: what is kept, by purpose, at each ZeRO stage."""

from __future__ import annotations

import copy

import torch

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.flops import activation_bytes

LARGEST_BUCKET = 12_288 * 4096
"""Elements (5e7) that DeepSpeed reduces or gathers at once; its default of 5e8 would waste gigabytes."""


def estimate(config: Config, denoiser: Denoiser, workers: int) -> dict[str, float]:
    parameters = sum(p.numel() for p in denoiser.parameters())
    return kept(config, parameters, workers) | {
        "activations": config.engine.micro_batch * activations(config, denoiser)
    }


def kept(config: Config, parameters: int, workers: int) -> dict[str, float]:
    bf16, stage = config.engine.precision == "bf16", config.engine.zero_stage
    per_parameter = {
        "weights": (3 * (2 if bf16 else 4), 3),
        "gradients": (2 * (6 if bf16 else 4), 2),
        "optimizer": (2 * (12 if stage else 8), 1),
        "average": (4, 1),
        "evaluation": (4, 4),
    }
    return {k: size * parameters / (workers if stage >= first else 1) for k, (size, first) in per_parameter.items()}


def activations(config: Config, denoiser: Denoiser) -> int:
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    network = copy.deepcopy(denoiser).to(dtype)
    learns, frozen = activation_bytes(network, True), activation_bytes(network, False)
    return {"fast": learns + 2 * frozen, "lean": learns + frozen, "minimal": max(learns, frozen)}[config.method.memory]
