"""Image numbers cut into parts, which one process works through or many share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Part(NamedTuple):
    """Images of one seed that are made together."""

    seed: int
    numbers: range


class Work(Protocol[T_co]):
    """What is done with parts, by name alone, so that another process can do it: picklable and hashable."""

    def load(self, device: torch.device) -> Callable[[Part], T_co]:
        """Load what is needed, once, and return what turns a part into its result."""
        ...


def cut(seeds: Iterable[int], num: int, batch: int) -> list[Part]:
    """Images 0..num-1 of each seed in parts of `batch`. The parts, and so the results, know no number of workers."""
    return [Part(seed, range(n, min(n + batch, num))) for seed in seeds for n in range(0, num, batch)]


def local_device() -> torch.device:
    """This process's GPU if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_here(work: Work[T], parts: Iterable[Part]) -> Iterator[tuple[Part, T]]:
    """Each part and its result, in this process."""
    run = work.load(local_device())
    for part in parts:
        yield part, run(part)


def in_order(parts: Iterable[Part], results: Iterable[tuple[Part, T]]) -> Iterator[T]:
    """The results in the order of the parts; what comes early waits."""
    found = iter(results)
    early: dict[Part, T] = {}
    for wanted in parts:
        while wanted not in early:
            part, result = next(found)
            early[part] = result
        yield early.pop(wanted)
