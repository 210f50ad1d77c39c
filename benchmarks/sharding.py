"""Memory of a rank and what it communicates, at every ZeRO stage on 1, 2, 4 and 8 gloo processes: counted, not timed.

    python -m benchmarks.sharding [--preset digits] [--ranks 1,2,4,8] [--images 2] [--json FILE]

Memory: bytes of the tensors that are alive after an iteration, beside the formula that dry runs print. Communication:
every collective of one iteration (one micro-batch per rank), as the size of the tensors that are reduced, gathered or
scattered, in units of a network's parameters; DeepSpeed's share alone, there is none of ours in a step.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

from benchmarks.ranks import on_ranks
from sid_ray.config import Config, load_config

STAGES = (0, 1, 2, 3)


def configuration(preset: str, ranks: int, images: int, stage: int, precision: str) -> Config:
    """A preset with a random teacher and one micro-batch per rank."""
    engine = {"engine.zero_stage": stage, "engine.precision": precision, "engine.micro_batch": images}
    return load_config(preset, {"teacher.random": True, "batch.size": images * ranks} | engine)


def measure(config: Config, ranks: int) -> dict[str, Any]:
    """What this rank keeps and communicates; in a process group of so many."""
    from sid_ray.training.bench import one_worker
    from sid_ray.training.communication import Communication
    from sid_ray.training.memory import memory_per_worker
    from sid_ray.training.rehearsal import LiveMemory

    with LiveMemory() as memory:
        iteration, networks, _ = one_worker(config)
        iteration(0)
        gc.collect()
    kept = memory.now
    with Communication() as communication:
        iteration(config.batch.size)
    parameters = sum(p.numel() for p in networks.plain.parameters())
    networks.destroy()
    return {
        "ranks": ranks,
        "stage": config.engine.zero_stage,
        "precision": config.engine.precision,
        "parameters": parameters,
        "kept": kept,
        "formula": sum(memory_per_worker(config, parameters, ranks).values()),
        "calls": dict(communication.calls),
        "bytes": dict(communication.bytes),
        "sent": communication.sent(ranks),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--images", type=int, default=2, help="Of a rank.")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for ranks in map(int, given.ranks.split(",")):
        jobs = [
            configuration(given.preset, ranks, given.images, stage, precision)
            for precision in given.precisions.split(",")
            for stage in STAGES
            if not (stage == 0 and precision == "bf16")
        ]
        rows += on_ranks(ranks, measure, jobs)
        print(f"{ranks} ranks: done", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown rows. Bytes are given per parameter of one network."""
    lines = [
        "| ranks | precision | stage | kept, bytes per parameter | formula | sent per step, bytes per parameter "
        "| collectives (calls: bytes per parameter) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        n = row["parameters"]
        calls = ", ".join(
            f"{name.strip('_')} {count}: {row['bytes'][name] / n:.1f}" for name, count in sorted(row["calls"].items())
        )
        lines.append(
            f"| {row['ranks']} | {row['precision']} | {row['stage']} | {row['kept'] / n:.1f} "
            f"| {row['formula'] / n:.1f} | {row['sent'] / n:.1f} | {calls} |"
        )
    return lines


if __name__ == "__main__":
    main()
