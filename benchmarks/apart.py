"""Work in processes of its own, one at a time: each has its memory to itself, and none disturbs another's time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

Iterate = Callable[[int], object]
"""Does the iteration that starts at so many images."""


@dataclass
class Iterated:
    """What came of the iterations of one process."""

    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0
    """Most resident bytes, from before the networks were built."""


class Apart:
    """A process that builds something to iterate, and iterates when it is told to."""

    def __init__(self, build: Callable[..., Iterate], *arguments: Any, threads: int, batch: int):
        self.result = Iterated()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, arguments, threads, batch), daemon=True)
        self.process.start()
        theirs.close()

    def iterate(self) -> float:
        """Seconds of one more iteration."""
        self.pipe.send("iterate")
        self.result.seconds.append(self.pipe.recv())
        return self.result.seconds[-1]

    def end(self) -> Iterated:
        """End the process; what it did."""
        self.pipe.send("end")
        self.result.peak_memory = self.pipe.recv()
        self.process.join()
        return self.result


def _serve(
    pipe: Connection, build: Callable[..., Iterate], arguments: tuple[Any, ...], threads: int, batch: int
) -> None:
    import torch

    from sid_ray.training.bench import peak_memory

    torch.set_num_threads(threads)
    iterate, nimg = build(*arguments), 0
    while pipe.recv() == "iterate":
        started = time.perf_counter()
        iterate(nimg)
        pipe.send(time.perf_counter() - started)
        nimg += batch
    pipe.send(peak_memory(torch.device("cpu")))


def build_published(config: Any) -> Iterate:
    """The published iteration of a configuration, in plain PyTorch."""
    import copy

    import torch

    from benchmarks.published import Published
    from sid_ray.training.run_directory import RunDirectory, start_of
    from sid_ray.training.slots import SeededDraws

    teacher = start_of(config, RunDirectory.of(config)).teacher()[0]
    draws = SeededDraws.of(config, teacher, 0, torch.device("cpu"))
    return Published(config, draws, teacher, copy.deepcopy(teacher), copy.deepcopy(teacher))


def build_ours(config: Any) -> Iterate:
    """This project's iteration, with its engines."""
    from sid_ray.training.bench import one_worker

    return one_worker(config)[0]
