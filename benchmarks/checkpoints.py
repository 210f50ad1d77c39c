"""Seconds that training stands still for a checkpoint or an evaluation's average, on gloo processes of this machine.

    python -m benchmarks.checkpoints [--preset digits] [--ranks 2] [--rounds 5] [--json FILE]

`checkpoint`: all of it, written to a temporary folder, synced and checked; `average`: the generator's average on every
worker. Both with tensors gathered many at once, as the trainer does, and, interleaved, one parameter at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.ranks import on_ranks
from benchmarks.sharding import configuration
from sid_ray.config import Config

STAGES = (1, 2, 3)


def measure(rounds: int, config: Config, ranks: int) -> dict[str, Any]:
    """Medians of a rank, in a process group of so many."""
    from sid_ray.training import shares
    from sid_ray.training.bench import one_worker

    iteration, networks, world = one_worker(config)
    iteration(0)
    seconds: dict[str, list[float]] = {}
    ways = {"together": shares.GATHERED_AT_ONCE, "apart": 1}
    for nimg in range(rounds):
        for how, limit in ways.items():
            with mock.patch.object(shares, "GATHERED_AT_ONCE", limit):
                for what, took in _once(networks, world, nimg).items():
                    seconds.setdefault(f"{what} {how}", []).append(took)
    parameters = sum(p.numel() for p in networks.plain.parameters())
    networks.destroy()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"ranks": ranks, "stage": config.engine.zero_stage, "parameters": parameters, "seconds": medians}


def _once(networks: Any, world: Any, nimg: int) -> dict[str, float]:
    """Seconds of a checkpoint and of an average, all ranks starting together."""
    from sid_ray.storage.depot import Depot
    from sid_ray.training.checkpoints import save_checkpoint
    from sid_ray.training.progress import Progress

    took = {}
    with tempfile.TemporaryDirectory() as own:
        folder = world.once(lambda: own)
        world.barrier()
        start = time.perf_counter()
        problem = save_checkpoint(Depot(Path(folder)), networks, Progress(nimg=nimg), world)
        took["checkpoint"] = time.perf_counter() - start
        assert problem is None, problem
        world.barrier()
        start = time.perf_counter()
        networks.generator.average()
        took["average"] = time.perf_counter() - start
        world.barrier()
    return took


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    jobs = [configuration(given.preset, given.ranks, 1, stage, "fp32") for stage in STAGES]
    rows = on_ranks(given.ranks, partial(measure, given.rounds), jobs)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown rows."""
    lines = [
        "| ranks | parameters | stage | checkpoint, s | one by one, s | average, s | one by one, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        s = row["seconds"]
        times = [s[f"{what} {how}"] for what in ("checkpoint", "average") for how in ("together", "apart")]
        first = f"| {row['ranks']} | {row['parameters'] / 1e6:.2f} M | {row['stage']} | "
        lines.append(first + " | ".join(f"{value:.3f}" for value in times) + " |")
    return lines


if __name__ == "__main__":
    main()
