"""A run on given GPUs, worked out before they are paid for: memory by ZeRO stage, speed, hours, money."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from sid_ray.config import Config, override
from sid_ray.errors import UserError
from sid_ray.training.memory import memory_per_worker

GB, TERA = 1e9, 1e12
UTILISATION = 0.25
"""Share of a GPU's peak that training is taken to reach: a cautious guess for convolutional networks, not measured."""
RESERVED_GB = 2.0
"""Of a GPU's memory, for the CUDA context, NCCL's buffers and cuDNN's workspaces."""
USABLE = 0.95
"""Share of the rest that can be filled: allocators leave gaps."""


class NetworkSize(NamedTuple):
    """What memory and speed depend on, of the one architecture that all networks share."""

    parameters: int
    flops: int
    """Additions and multiplications of one forward pass of an image."""
    activations: float
    """Bytes that each image of a micro-batch adds at the peak of an iteration, in the run's precision and modes."""


class Speed(NamedTuple):
    """Peak of a GPU's tensor cores in 10^12 additions and multiplications a second, without sparsity."""

    bf16: float
    fp32: float
    """In TF32, which cuDNN uses for float32 convolutions."""


GPUS = {
    "B200": (180, Speed(2250, 1100)),
    "H200": (141, Speed(989, 494)),
    "H100": (80, Speed(989, 494)),
    "A100": (80, Speed(312, 156)),
    "L40S": (48, Speed(362, 183)),
    "A10G": (24, Speed(70, 35)),
    "L4": (24, Speed(121, 60)),
    "RTX4090": (24, Speed(165, 83)),
}
"""Memory in GB and speed by name; from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Machine:
    """So many GPUs of a kind."""

    count: int
    name: str
    memory_gb: float
    speed: Speed


def parse_machine(text: str) -> Machine:
    """`8xH100-80GB`, `4xL40S`: how many, which, and with how much memory if not the usual. UserError for others."""
    found = re.fullmatch(r"([1-9]\d*)x([A-Za-z0-9]+?)(?:-(\d+)GB)?", text.strip(), re.IGNORECASE)
    known = {name.lower(): name for name in GPUS}
    if not found or found[2].lower() not in known:
        names = ", ".join(f"{name}-{memory}GB" for name, (memory, _) in GPUS.items())
        raise UserError(
            f"--plan: {text!r} is not allowed; allowed: a number, x and a GPU, as 8xH100-80GB; GPUs: {names}"
        )
    name = known[found[2].lower()]
    memory, speed = GPUS[name]
    return Machine(int(found[1]), name, float(found[3] or memory), speed)


def plan_lines(
    config: Config, size: NetworkSize, machine: Machine, price: float | None, utilisation: float
) -> list[str]:
    """What to tell: a table of memory by stage, then speed, time and money of the whole run.

    The precision is settled; a micro-batch that is `auto` becomes the largest that fits. `price`: of one GPU for one
    hour, in any currency. UserError if not even one image fits.
    """
    if config.engine.micro_batch == "auto":
        largest = largest_micro_batch(config, size, machine)
        if largest is None:
            raise UserError(f"--plan: not one image fits into {machine.memory_gb:g} GB at this configuration")
        config = _with(config, micro_batch=largest)
    speed = machine.speed.bf16 if config.engine.bf16 else machine.speed.fp32
    rate = images_per_second(config, size.flops, machine, utilisation)
    hours = config.total_nimg / rate / 3600
    busy = _busy(config, machine.count)
    lines = [
        f"{machine.count} x {machine.name} with {machine.memory_gb:g} GB, {speed:g} TFLOP/s at most in "
        f"{config.engine.precision}",
        *memory_table(config, size, machine),
        f"{rate:,.0f} images/s at {utilisation:.0%} of the peak (taken to be, not measured)"
        + (f" and {busy:.0%} of the GPUs busy: {config.num_slots} micro-batches do not divide by them" * (busy < 1)),
        f"{hours:,.1f} hours for {config.run.total_kimg:g} kimg, without evaluations and checkpoints",
    ]
    if price is not None:
        lines.append(f"{hours * machine.count * price:,.0f} at {price:g} per GPU and hour")
    return lines


def images_per_second(config: Config, flops: int, machine: Machine, utilisation: float) -> float:
    """Images trained in a second, if each GPU reaches this share of its peak."""
    peak = (machine.speed.bf16 if config.engine.bf16 else machine.speed.fp32) * TERA
    return machine.count * peak * utilisation * _busy(config, machine.count) / (config.forwards * flops)


def largest_micro_batch(config: Config, size: NetworkSize, machine: Machine) -> int | None:
    """The most images of one forward pass that fit: a divisor of the batch, no more than a GPU's share of it.

    None if not even one fits.
    """
    share = -(-config.batch.size // machine.count)
    for images in range(share, 0, -1):
        if config.batch.size % images == 0 and _fits(_with(config, micro_batch=images), size, machine):
            return images
    return None


def memory_table(config: Config, size: NetworkSize, machine: Machine) -> list[str]:
    """Memory of a GPU in GB at every ZeRO stage of the precision, and the largest micro-batch that fits."""
    stages = (1, 2, 3) if config.engine.bf16 else (0, 1, 2, 3)
    rows: list[list[str]] = []
    for stage in stages:
        staged = _with(config, zero_stage=stage)
        parts = _parts(staged, size, machine.count)
        largest = largest_micro_batch(staged, size, machine)
        amounts = [f"{amount / GB:.2f}" for amount in (*parts.values(), sum(parts.values()))]
        verdict = "fits" if _fits(staged, size, machine) else "TOO LARGE"
        rows.append(
            [f"ZeRO-{stage}" + "*" * (stage == config.engine.zero_stage), *amounts, verdict, str(largest or "-")]
        )
    head = ["GB per GPU", *parts, "in all", f"of {machine.memory_gb:g}", "largest micro-batch"]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    micro_batch = config.micro_batch
    return [
        *table,
        f"(* as configured; activations of engine.micro_batch {micro_batch}, method.memory {config.method.memory})",
    ]


def _fits(config: Config, size: NetworkSize, machine: Machine) -> bool:
    needed = sum(_parts(config, size, machine.count).values()) / GB
    return needed <= (machine.memory_gb - RESERVED_GB) * USABLE


def _parts(config: Config, size: NetworkSize, workers: int) -> dict[str, float]:
    """Bytes of a GPU by purpose, activations included."""
    activations = config.micro_batch * size.activations
    kept = memory_per_worker(config, size.parameters, workers, activations=activations)
    return kept | {"activations": activations}


def _with(config: Config, **engine: int) -> Config:
    return override(config, {f"engine.{field}": value for field, value in engine.items()})


def _busy(config: Config, workers: int) -> float:
    """Share of the workers' passes that train: with surplus ones some wait for the others."""
    passes = -(-config.num_slots // workers) * workers
    return config.num_slots / passes
