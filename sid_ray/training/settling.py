"""What a configuration leaves to the machines (`auto`), settled when a run begins and kept from then on.

The outcome stands in the run's config.yaml: random draws belong to slots, so a run that goes on elsewhere, with more
memory or none of bf16, still has to take the same micro-batch and should take the same precision.
"""

from __future__ import annotations

import os
from functools import partial

import psutil
import torch

from sid_ray.config import Config, override
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.errors import UserError
from sid_ray.teachers.model_directory import write_text
from sid_ray.teachers.modules import check_trainable
from sid_ray.teachers.start import Start
from sid_ray.training.distributed import World
from sid_ray.training.memory import memory_per_worker
from sid_ray.training.opening import as_recorded
from sid_ray.training.outside import Outside
from sid_ray.training.rehearsal import bytes_per_image
from sid_ray.training.run_directory import RunDirectory

SHARE = 0.85
"""Of the free memory that is filled; the rest is for workspaces, communication buffers and fragments."""
GIGA = 1e9


def settle(config: Config, run: RunDirectory, start: Start, world: World, outside: Outside) -> Config:
    """The configuration without `auto`, on every worker and in the run's config.yaml. Collective.

    UserError if not even one image fits into the memory.
    """
    config, notes = settled(world.once(lambda: as_recorded(config, run)), start, world)
    if notes and world.is_first:
        write_text(run.config_yaml, config.to_yaml())
        for note in notes:
            outside.note(f"{note}, for the whole run")
    world.barrier()
    return config


def settled(config: Config, start: Start, world: World) -> tuple[Config, list[str]]:
    """The configuration without `auto`, and what was settled, in words. Collective. UserError as `settle`."""
    notes = []
    if config.engine.precision == "auto":
        native = all(world.gather(computes_in_bf16(world.device)))
        possible = native and config.engine.zero_stage > 0 and world.once(lambda: _runs_in_bf16(start))
        precision = "bf16" if possible else "fp32"
        config = override(config, {"engine.precision": precision})
        notes.append(f"engine.precision auto is {precision}")
    if config.engine.micro_batch == "auto":
        free = min(world.gather(config.engine.memory_gb or free_memory(world.device) / GIGA)) * GIGA
        size = world.once(partial(_largest, config, start, free, world.size))
        config = override(config, {"engine.micro_batch": size})
        notes.append(f"engine.micro_batch auto is {size} (in {free / GIGA:.3g} GB)")
    return config, notes


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16: then it is faster than float32, else slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def free_memory(device: torch.device) -> float:
    """Bytes that this worker may fill: what is free on its GPU, or its share of what is available on its machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def largest_micro_batch(config: Config, network: Denoiser, memory: float, workers: int) -> int:
    """The largest micro-batch whose activations fit beside what a worker keeps, in `memory` bytes; see `largest_share`.

    `network`: of the trained networks' architecture. UserError if not even one image fits.
    """
    kept = sum(memory_per_worker(config, sum(p.numel() for p in network.parameters()), workers).values())
    per_image = bytes_per_image(config, network)
    size = largest_share(config.batch.size, workers, (SHARE * memory - kept) / per_image)
    if size is None:
        raise UserError(
            f"engine.micro_batch: auto: not one image fits into {memory / GIGA:.3g} GB ({kept / GIGA:.3g} for the "
            f"networks, {per_image / GIGA:.3g} for an image); try method.memory minimal, "
            "engine.activation_checkpointing true, or a higher engine.zero_stage on more workers"
        )
    return size


def largest_share(batch: int, workers: int, most: float) -> int | None:
    """The largest divisor of the global batch that is at most `most`; None if there is none.

    And at most a worker's share of the batch: with a larger one workers would have nothing to do.
    """
    share = min(max(batch // workers, 1), most)
    return max((n for n in range(1, batch + 1) if n <= share and batch % n == 0), default=None)


def _largest(config: Config, start: Start, memory: float, workers: int) -> int:
    """`largest_micro_batch` of a run; weights are not loaded where a file describes the network."""
    model = start.models()[1]
    network = start.student()[0] if model.is_python else model.skeleton()
    return largest_micro_batch(config, network, memory, workers)


def _runs_in_bf16(start: Start) -> bool:
    """Networks of this package do; a user's own is tried."""
    if not start.models()[1].is_python:
        return True
    try:
        check_trainable(start.student()[0], "the network", "bf16")
    except UserError:
        return False
    return True
