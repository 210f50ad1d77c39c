"""`sid-ray bench`: time and memory of one iteration on one worker, phase by phase. No Ray, and nothing is written.

The worker is as in a run: the same engines, step and random draws. Started with torchrun, it is one of several.
"""

from __future__ import annotations

import copy
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from sid_ray.config import Config
from sid_ray.diffusion.flops import network_cost
from sid_ray.training.communication import Communication
from sid_ray.training.distributed import World, join_world
from sid_ray.training.networks import Networks, build_networks
from sid_ray.training.opening import check_method, check_workers
from sid_ray.training.phases import Stopwatch
from sid_ray.training.run_directory import RunDirectory, start_of
from sid_ray.training.settling import settled
from sid_ray.training.slots import SeededDraws, slots_of_rank
from sid_ray.training.step import Iteration

PHASES = ("fake-score step", "score gradients", "generator step", "Adam", "EMA", "data")
"""What the step is divided into; each without those within it."""
MATRIX = {"cuda": 8192, "cpu": 2048}
"""Size of the square matrices whose product is a device's peak."""


class Spread(BaseModel):
    """Median and quartiles of repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(median=median, low=low, high=high)


class BenchReport(BaseModel):
    """What `bench` measured, in seconds, bytes and floating-point operations, of one worker."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    preset: str
    machine: dict[str, str]
    settings: dict[str, Any]
    parameters: int
    """Of one network."""
    warm_up: int
    repetitions: int
    seconds: Spread
    """Of an iteration."""
    phases: dict[str, Spread]
    """Seconds of each phase of an iteration, without those within it; `communication` in an iteration of its own."""
    communication: dict[str, int]
    """Bytes of whole tensors in an iteration, by collective."""
    images_per_second: float
    flops: float
    """Of an iteration: forward passes times those of one, as torch counts them."""
    flops_per_second: float
    peak_flops_per_second: float
    """Measured, of a product of two matrices in the same precision on this device."""
    peak_memory: int
    """Bytes: of torch's allocator on a GPU, else of the process."""

    @property
    def share_of_peak(self) -> float:
        """Of the device's measured peak."""
        return self.flops_per_second / self.peak_flops_per_second


def bench(config: Config, repetitions: int = 5, warm_up: int = 2) -> BenchReport | None:
    """Measure iterations of a configuration on this worker; None on all but the first. Collective under torchrun.

    UserError as at the start of a run if the configuration cannot run.
    """
    torch.set_num_threads(config.cluster.cpus_per_worker)
    iteration, networks, world = one_worker(config)
    config = iteration.config
    parameters, forward = network_cost(copy.deepcopy(networks.plain).to("meta"))
    peak = matrix_peak(world.device, torch.bfloat16 if config.engine.bf16 else torch.float32)
    try:
        laps = _laps(iteration, config.batch.size, world, warm_up, repetitions)
        memory = peak_memory(world.device)
        with Communication() as communication:
            iteration((warm_up + repetitions) * config.batch.size)
    finally:
        networks.destroy()
    if not world.is_first:
        return None
    seconds = Spread.of([sum(lap.values()) for lap in laps])
    phases = {name: Spread.of([lap.get(name, 0.0) for lap in laps]) for name in PHASES}
    flops = float(config.forwards * forward * config.micro_batch * len(iteration.slots))
    return BenchReport(
        preset=config.run.name,
        machine=machine(world),
        settings=_settings(config, world),
        parameters=parameters,
        warm_up=warm_up,
        repetitions=repetitions,
        seconds=seconds,
        phases=phases | {"communication": Spread.of([communication.seconds])},
        communication=dict(communication.bytes),
        images_per_second=config.batch.size / seconds.median,
        flops=flops,
        flops_per_second=flops / seconds.median,
        peak_flops_per_second=peak,
        peak_memory=memory,
    )


def one_worker(config: Config) -> tuple[Iteration, Networks, World]:
    """A worker's iteration as in a run that begins, without a run: nothing is written. Collective under torchrun.

    The iteration's configuration is settled. UserError as at the start of a run.
    """
    world = join_world()
    check_workers(config, world.size)
    start = start_of(config, RunDirectory.of(config))
    check_method(config, start.check())
    config = settled(config, start, world)[0]
    check_workers(config, world.size)
    (teacher, _), (student, _) = start.teacher(), start.student()
    generator, fake_score = start.role("generator", copy.deepcopy(student)), start.role("fake_score", student)
    slots = slots_of_rank(config.num_slots, world.rank, world.size)
    networks = build_networks(config, world, len(slots), teacher, generator, fake_score)
    draws = SeededDraws.of(config, networks.plain, 0, world.device)
    return Iteration(config, networks, draws, slots), networks, world


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype, repetitions: int = 5) -> float:
    """Floating-point operations per second of the best of some products of square matrices."""
    n = MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repetitions + 1):
        wait_for(device)
        started = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * n**3 / best


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of torch's allocator on a GPU, else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def machine(world: World) -> dict[str, str]:
    """What the figures were measured on."""
    import deepspeed

    gpu = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if gpu else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "workers": str(world.size),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
    }


def describe(report: BenchReport) -> str:
    """The report as text for a person."""
    lines = [
        f"{report.preset} on " + ", ".join(f"{k} {v}" for k, v in report.machine.items()),
        ", ".join(f"{k} {v}" for k, v in report.settings.items()),
        f"median of {report.repetitions} iterations after {report.warm_up}, and quartiles:",
    ]
    rows = [("iteration", report.seconds), *report.phases.items()]
    lines += [f"  {name:16} {s.median:10.4f} s   ({s.low:.4f} to {s.high:.4f})" for name, s in rows]
    return "\n".join(
        [
            *lines,
            f"{report.images_per_second:.4g} images/s; {report.flops / 1e9:,.4g} GFLOP an iteration, "
            f"{report.flops_per_second / 1e9:,.4g} GFLOP/s, {report.share_of_peak:.1%} of the "
            f"{report.peak_flops_per_second / 1e9:,.4g} that a matrix product reaches",
            f"peak memory {report.peak_memory / 1e9:.3g} GB",
        ]
    )


def _laps(iteration: Iteration, batch: int, world: World, warm_up: int, repetitions: int) -> list[dict[str, float]]:
    """Seconds by phase of each iteration after the warm-up, in which memory is not counted either."""
    laps = []
    for number in range(warm_up + repetitions):
        if number == warm_up:
            forget_peak_memory(world.device)
        with Stopwatch(lambda: wait_for(world.device)) as stopwatch:
            iteration(number * batch)
        laps.append(stopwatch.seconds)
    return laps[warm_up:]


def _settings(config: Config, world: World) -> dict[str, Any]:
    engine, method = config.engine, config.method
    return {
        "batch": config.batch.size,
        "micro_batch": config.micro_batch,
        "precision": engine.precision,
        "zero_stage": engine.zero_stage,
        "memory": method.memory,
        "latents": method.latents,
        "activation_checkpointing": engine.activation_checkpointing,
        "channels_last": engine.channels_last,
        "compile": engine.compile,
    }
