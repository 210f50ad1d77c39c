"""Sampling and measuring on all there is: parts of the image numbers as Ray tasks, one GPU or CPU each."""

from __future__ import annotations

import functools
import itertools
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from sid_ray.errors import UserError
from sid_ray.evaluation.parts import Part, Work, local_device, run_here
from sid_ray.launch.ray_start import extend_import_path, import_path, start_ray

T = TypeVar("T")


def map_parts(work: Work[T], parts: Sequence[Part], workers: str = "auto") -> Iterator[tuple[Part, T]]:
    """Each part and its result, as they become ready.

    `workers`: a number, or `auto`: all GPUs (or, without any, all CPUs) of the Ray cluster that RAY_ADDRESS names,
    else all GPUs of this machine, else one. One worker is this process. UserError for a number that is not to be had.
    """
    wanted = _parse(workers)
    if wanted is None and "RAY_ADDRESS" not in os.environ:
        wanted = max(torch.cuda.device_count(), 1)
    return run_here(work, parts) if wanted == 1 else _on_ray(work, parts, wanted)


def _parse(workers: str) -> int | None:
    if workers == "auto":
        return None
    if not (workers.isdecimal() and int(workers) > 0):
        raise UserError(f"--workers: {workers!r} is not allowed; allowed: auto or a number of at least 1")
    return int(workers)


def _on_ray(work: Work[T], parts: Sequence[Part], wanted: int | None) -> Iterator[tuple[Part, T]]:
    """As many tasks at a time as workers; a part whose worker is lost runs again elsewhere."""
    import ray

    connected = ray.is_initialized()
    start_ray(wanted or 1)
    try:
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
        most, kind = (gpus, "GPU") if gpus else (cpus, "CPU")
        if (wanted or 1) > most:
            raise UserError(f"--workers: {wanted or 'auto'} needs as many {kind}s; there are {most}")
        # Without a limit on calls a process with a GPU, too, keeps what it loaded for its next part.
        task: Any = ray.remote(num_cpus=int(not gpus), num_gpus=int(bool(gpus)), max_calls=0)(_run)
        launch, shared, paths = uuid.uuid4().hex, ray.put(work), import_path()
        left = iter(parts)
        running = {task.remote(launch, paths, shared, part): part for part in itertools.islice(left, wanted or most)}
        while running:
            (done,), _ = ray.wait(list(running))
            part, result = running.pop(done), _result(done)
            for following in itertools.islice(left, 1):
                running[task.remote(launch, paths, shared, following)] = following
            yield part, result
    finally:
        if not connected:
            ray.shutdown()


def _result(done: Any) -> Any:
    import ray

    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise


def _run(launch: str, paths: list[str], work: Any, part: Part) -> Any:
    """The task: a part's result."""
    extend_import_path(paths)
    return _loaded(launch, work)(part)


@functools.lru_cache(maxsize=1)
def _loaded(launch: str, work: Any) -> Callable[[Part], Any]:
    """The work of a launch, loaded once per process."""
    return work.load(local_device())
