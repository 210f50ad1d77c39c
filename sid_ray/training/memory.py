"""The memory of a worker: predicted by purpose (benchmarks/planner.py compares), and kept between iterations."""

from __future__ import annotations

import ctypes
import platform

from sid_ray.config import Config, override
from sid_ray.training.engines import LARGEST_BUCKET


def memory_per_worker(
    config: Config, parameters: int, workers: int, *, activations: float = 0.0, gpu: bool = True
) -> dict[str, float]:
    """Bytes that one worker keeps at the most during an iteration, by purpose, beside the activations.

    Three networks (teacher, generator, fake score) and the gradients of the two that learn; for these Adam's moments
    and, from stage 1 on, DeepSpeed's float32 masters; the generator's average; DeepSpeed's float32 buckets, and at
    stage 3 the gathered weights, which stay for networks below its limit of 10^9 parameters; a float32 network to
    evaluate with. On a GPU gradients are reduced while others are computed, which takes a second bucket. `activations`:
    those of a micro-batch, whose place serves buffers that are needed afterwards.
    """
    bf16, stage = config.engine.precision == "bf16", config.engine.zero_stage
    own = 2 if bf16 else 4
    bucket = 4.0 * min(LARGEST_BUCKET, parameters)
    buffers = {
        0: 0.0,
        # While one network is on its backward pass; bf16's optimizer flattens afterwards what it reduces, twice.
        1: max(2 * bucket - activations, 0.0) if bf16 else bucket * (1 + gpu),
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
    }


def on_gpus(config: Config) -> Config:
    """The configuration as it is settled on GPUs that compute in bf16, but for a micro-batch that is `auto`."""
    if config.engine.precision != "auto":
        return config
    return override(config, {"engine.precision": "bf16" if config.engine.zero_stage else "fp32"})


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let this process keep the main memory that it frees, for the next iteration, instead of giving it back.

    glibc returns large blocks at once, and the system hands them out again page by page, zeroed: a fifth of the time of
    an iteration in float32 on two cores. The price is some memory, where what was freed does not fit what is asked for:
    7 % was measured. Nothing happens with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    # Blocks up to here come from the heap, which is kept; an old glibc refuses more than 32 MiB.
    if not mallopt(M_MMAP_THRESHOLD, 2**30):
        mallopt(M_MMAP_THRESHOLD, 2**25)
