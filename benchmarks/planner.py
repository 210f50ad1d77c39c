"""The planner's memory against what a worker really takes, on the CPU.

    MALLOC_MMAP_THRESHOLD_=262144 MALLOC_TRIM_THRESHOLD_=262144 OMP_NUM_THREADS=1 \
        torchrun --standalone --nproc-per-node 2 benchmarks/planner.py NAME [NAME ...]

Trains random networks of the sizes named (see SIZES) for an iteration at every allowed stage and precision, or at those
that follow a slash as `stage:precision` (`cifar10/0:fp32,3:bf16`), and prints rows of a markdown table. Measured is the
largest resident memory of any rank during the iteration, less what the process held before any network was built. The
malloc settings give freed memory back at once, so that fragmentation is not counted.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

from sid_ray.config import Config, load_config
from sid_ray.diffusion.denoiser import EDMDenoiser
from sid_ray.training.distributed import World, join_world
from sid_ray.training.memory import memory_per_worker
from sid_ray.training.networks import build_networks
from sid_ray.training.rehearsal import bytes_per_image
from sid_ray.training.slots import SeededDraws, slots_of_rank
from sid_ray.training.step import Iteration

COMBINATIONS = ["0:fp32", "1:fp32", "2:fp32", "3:fp32", "1:bf16", "2:bf16", "3:bf16"]
DDPMPP = {
    "img_channels": 3, "channel_mult": [2, 2, 2], "dropout": 0.13, "augment_dim": 9, "embedding_type": "positional",
    "encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1],
}  # fmt: skip
SIZES = {
    # name: (network, images per micro-batch, micro-batches per rank)
    "tiny": ({**DDPMPP, "img_resolution": 16, "model_channels": 32}, 4, 2),
    "small": ({**DDPMPP, "img_resolution": 32, "model_channels": 64}, 2, 2),
    "cifar10": ({**DDPMPP, "img_resolution": 32, "model_channels": 128}, 2, 1),
}


def main(names: list[str]) -> None:
    """Measure and print, one row for each size, stage and precision."""
    world = join_world()
    torch.set_num_threads(1)
    columns = "network | ranks | stage | precision | memory | measured MB | predicted MB | error | parts"
    if world.is_first:
        print(f"| {columns} |\n|{'---|' * columns.count('|')}---|", flush=True)
    first = True
    for name in names:
        size, _, chosen = name.partition("/")
        for combination in chosen.split(",") if chosen else COMBINATIONS:
            if first:  # libraries and DeepSpeed's first buffers are no part of a network's memory
                measure("tiny", "1:fp32", world)
                first = False
            row = measure(size, combination, world)
            if world.is_first:
                print(row, flush=True)


def measure(size: str, combination: str, world: World) -> str:
    """One row of the table."""
    network, micro_batch, slots = SIZES[size]
    stage, precision, *memory = combination.split(":")
    config = load_config(
        "digits",
        {
            "engine.zero_stage": int(stage),
            "engine.precision": precision,
            "engine.micro_batch": micro_batch,
            "batch.size": micro_batch * slots * world.size,
            "method.memory": memory[0] if memory else "fast",
        },
    )
    parts = predict(config, network, world.size)
    give_back()
    before = resident("VmRSS")
    measured = max(world.gather(train(config, network, world) - before))
    predicted = sum(parts.values())
    shown = ", ".join(f"{name} {amount / 1e6:.0f}" for name, amount in parts.items())
    return (
        f"| {size} | {world.size} | {stage} | {precision} | {config.method.memory} | {measured / 1e6:.0f} | "
        f"{predicted / 1e6:.0f} | {100 * (predicted / measured - 1):+.0f} % | {shown} |"
    )


def predict(config: Config, network: dict[str, object], workers: int) -> dict[str, float]:
    """Bytes of a worker by purpose, on CPUs."""
    with torch.device("meta"):
        denoiser = EDMDenoiser(**network)  # type: ignore[arg-type]
        activations = config.micro_batch * bytes_per_image(config, denoiser)
    parameters = sum(p.numel() for p in denoiser.parameters())
    kept = memory_per_worker(config, parameters, workers, activations=activations, gpu=False)
    return kept | {"activations": activations}


def train(config: Config, network: dict[str, object], world: World) -> int:
    """The most resident bytes of this rank during an iteration."""
    torch.manual_seed(0)
    teacher = EDMDenoiser(**network)  # type: ignore[arg-type]
    generator, fake_score = EDMDenoiser(**network), EDMDenoiser(**network)  # type: ignore[arg-type]
    slots = slots_of_rank(config.num_slots, world.rank, world.size)
    networks = build_networks(config, world, len(slots), teacher, generator, fake_score)
    del teacher, generator, fake_score
    draws = SeededDraws.of(config, networks.plain, 0, world.device)
    iteration = Iteration(config, networks, draws, slots)
    give_back()
    world.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    iteration(0)
    peak = resident("VmHWM")
    networks.destroy()
    del networks, draws, iteration
    gc.collect()
    world.barrier()
    return peak


def give_back() -> None:
    """Free memory goes back to the system, so that what is resident is what is in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
