"""Functions run on the ranks of a gloo process group on this machine, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from sid_ray.config import Config


def on_ranks(ranks: int, measure: Callable[[Config, int], Any], jobs: list[Config]) -> list[Any]:
    """What the first rank gets for each job, one after the other in one process group.

    `measure` is called on every rank with the job and the number of ranks; it must be importable.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.SimpleQueue()
    arguments = [(rank, ranks, port, measure, jobs, results) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=own) for own in arguments]
    for process in processes:
        process.start()
    rows = [results.get() for _ in jobs]
    for process in processes:
        process.join()
    return rows


def _rank(
    rank: int, ranks: int, port: int, measure: Callable[[Config, int], Any], jobs: list[Config], results: Any
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    import torch

    torch.set_num_threads(1)
    for config in jobs:
        row = measure(config, ranks)
        if rank == 0:
            results.put(row)
