"""The memory of a worker, predicted by purpose; benchmarks/planner.py compares it with what a worker takes."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.flops import activation_bytes
from sid_ray.training.engines import LARGEST_BUCKET


class NetworkSize(NamedTuple):
    """What the memory of a run depends on, of the one architecture that all networks share."""

    parameters: int
    learning: int
    """Bytes of an image's graph through a network that learns."""
    frozen: int
    """Bytes of an image's graph through a frozen one."""


def network_size(denoiser: Denoiser, config: Config) -> NetworkSize:
    """Counted, in the run's precision; on the meta device nothing is allocated."""
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    network = copy.deepcopy(denoiser).to(dtype)
    return NetworkSize(
        sum(p.numel() for p in network.parameters()), activation_bytes(network, True), activation_bytes(network, False)
    )


def memory_per_worker(config: Config, size: NetworkSize, workers: int, gpu: bool = True) -> dict[str, float]:
    """Bytes that one worker takes at the most during an iteration, by purpose.

    Three networks (teacher, generator, fake score) and the gradients of the two that learn; for these Adam's moments
    and, from stage 1 on, DeepSpeed's float32 masters; the generator's average; DeepSpeed's float32 buckets, and at
    stage 3 the gathered weights, which stay for networks below its limit of 10^9 parameters; a float32 network to
    evaluate with; the graphs of a micro-batch. On a GPU gradients are reduced while others are computed, which takes a
    second bucket. A precision that is not settled counts as fp32; the micro-batch must be settled. Checkpointed
    activations are counted as if they were kept.
    """
    bf16, stage = config.engine.precision == "bf16", config.engine.zero_stage
    parameters, own = size.parameters, 2 if bf16 else 4
    bucket = 4.0 * min(LARGEST_BUCKET, parameters)
    per_image = _graphs(config, size)
    graphs = config.micro_batch * per_image if per_image else 0.0
    buffers = {
        0: 0.0,
        # While one network is on its backward pass; bf16's optimizer flattens afterwards what it reduces, twice.
        1: max(2 * bucket - graphs, 0.0) if bf16 else bucket * (1 + gpu),
        2: bucket * (1 + gpu),
        # Those of both networks, always, and the gathered weights of all three.
        3: 2 * bucket + 3.0 * own * parameters,
    }[stage]
    # Gradients are there while their network learns; where bf16 at stage 1 and stage 3 accumulate them stays.
    gradients = {0: own, 1: own + (8 if bf16 else 0), 2: 4 + (2 if bf16 else 0), 3: 8 + (4 if bf16 else 0)}[stage]

    def shared(number: float, first: int) -> float:
        return number * parameters / (workers if stage >= first else 1)

    return {
        "weights": shared(3 * own, 3),
        "gradients": shared(gradients, 2),
        "optimizer + EMA": shared(2 * (12 if stage else 8) + 4, 1),
        "buffers": buffers,
        "evaluation": 4.0 * parameters,
        "activations": graphs,
    }


def kept_per_worker(config: Config, parameters: int, workers: int) -> float:
    """Bytes that one worker takes beside the graphs of a micro-batch, for networks of so many parameters."""
    return sum(memory_per_worker(config, NetworkSize(parameters, 0, 0), workers).values())


def _graphs(config: Config, size: NetworkSize) -> float:
    """Bytes of the graphs that are alive at once, for one image."""
    return {
        "fast": size.learning + 2 * size.frozen,
        "lean": size.learning + size.frozen,
        "minimal": max(size.learning, size.frozen),
    }[config.method.memory]
