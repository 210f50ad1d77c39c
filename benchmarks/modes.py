"""Peak memory of one iteration in each mode, against the published iteration in plain autograd.

    python -m benchmarks.modes [--preset cifar10-uncond] [--batch 16] [--counted] [--threads 2] [--json FILE]

Measured, each in a process of its own: its most resident bytes, libraries and workspaces included. And counted: what is
kept (the formula of dry runs) and the activations of a rehearsal on the meta device, which `engine.micro_batch auto`
goes by; for the published iteration all tensors that are alive at the peak. `--counted` computes nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import Apart, Iterate, build_ours, build_published
from benchmarks.compare import FP32, configuration
from benchmarks.published import Published
from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.training.memory import memory_per_worker
from sid_ray.training.rehearsal import META, LiveMemory, rehearse
from sid_ray.training.run_directory import RunDirectory, start_of
from sid_ray.training.slots import SeededDraws

BF16 = {"engine.precision": "bf16", "engine.zero_stage": 1}
MODES: dict[str, dict[str, Any]] = {
    "fast": {},
    "lean": {"method.memory": "lean"},
    "minimal": {"method.memory": "minimal"},
    "fast, checkpointing": {"engine.activation_checkpointing": True},
    "minimal, checkpointing": {"method.memory": "minimal", "engine.activation_checkpointing": True},
}


def measure(build: Callable[[Config], Iterate], config: Config, threads: int) -> int:
    """Peak resident bytes of a process that makes one iteration."""
    process = Apart(build, config, threads=threads, batch=config.batch.size)
    process.iterate()
    return process.end().peak_memory


def count(build: Callable[[Config], Iterate], config: Config) -> float:
    """Bytes of all tensors at the peak, without allocating them."""
    network = start_of(config, RunDirectory.of(config)).check()
    if build is build_published:
        return count_published(config, network)
    parameters = sum(p.numel() for p in network.parameters())
    return sum(memory_per_worker(config, parameters, 1).values()) + rehearse(config, network)


def count_published(config: Config, network: Denoiser) -> float:
    """Bytes of all tensors of the published iteration at its peak, from the second iteration on."""
    with torch.random.fork_rng(), LiveMemory() as memory:
        three = [copy.deepcopy(network).to(META) for _ in range(3)]
        published = Published(config, SeededDraws.of(config, network, 0, META), *three)
        for nimg in (0, config.batch.size):
            published(nimg)
    return memory.peak


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-uncond")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--counted", action="store_true", help="Run nothing.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    jobs: dict[str, tuple[Callable[[Config], Iterate], dict[str, Any]]] = {"published, fp32": (build_published, {})}
    for precision, engine in (("fp32", FP32), ("bf16", BF16)):
        jobs |= {f"{mode}, {precision}": (build_ours, engine | settings) for mode, settings in MODES.items()}
    rows = {}
    for name, (build, settings) in jobs.items():
        config = configuration(given.preset, given.batch, settings)
        measured = None if given.counted else measure(build, config, given.threads)
        rows[name] = {"forwards": config.forwards, "counted": count(build, config), "measured": measured}
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    if given.json:
        document = {"preset": given.preset, "batch": given.batch, "rows": rows}
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows; ratios are to the first one."""
    reference = next(iter(rows.values()))
    lines = [
        "| mode | forwards per image | counted, GB | of the published | measured, GB | of the published |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [f"{row['counted'] / 1e9:.2f}", f"{row['counted'] / reference['counted']:.2f}", "", ""]
        if row["measured"] is not None:
            cells[2:] = [f"{row['measured'] / 1e9:.2f}", f"{row['measured'] / reference['measured']:.2f}"]
        lines.append(f"| {name} | {row['forwards']} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
