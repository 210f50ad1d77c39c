"""Where this worker stands among the others: rank, size, device, and the few collectives of our own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sid_ray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One worker's place; torch.distributed is initialised, with size 1 in a plain process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the workers, on every one of them."""
        dist.all_reduce(values)
        return values

    def gather_rows(self, rows: Tensor) -> None:
        """Fill in the other workers' rows of (workers, N) float32, each of which has its own row there."""
        dist.all_gather_into_tensor(rows.view(-1), rows[self.rank])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def from_first(self, value: float) -> float:
        """The first worker's value, on every one: others may have rounded it differently."""
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def barrier(self) -> None:
        """Wait for all workers."""
        self.sum(torch.zeros(1, device=self.device))

    def once(self, action: Callable[[], T]) -> T:
        """Do it on the first worker while the others wait; its result, or its UserError, is every worker's."""
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, device=self.device)
        result, message = outcome
        if message is not None:
            raise UserError(message)
        return result

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in the order of ranks, on every worker."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def join_world() -> World:
    """Join the process group that the launcher described, or make one of a single worker.

    Ray Train initialises the group itself; torchrun describes it in the environment; a plain process gets a
    group of its own.
    """
    gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if not dist.is_initialized():
        backend = "nccl" if gpu else "gloo"
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed reads these, whoever initialised the group.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device)
