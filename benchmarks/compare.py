"""This project's iteration against the published one, interleaved: seconds per image and peak memory as ratios.

    python -m benchmarks.compare [--preset cifar10-uncond] [--batch 4] [--rounds 5] [--threads 2] [--json FILE]

Each variant runs beside the published iteration in a process of its own, turn by turn, so that whatever else the
machine does meets both. The teacher has random weights; the work does not depend on them. A ratio above 1 is in our
favour.
`--memory-batch 32` compares peak memory, with one iteration each, at a batch where activations dominate.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.apart import Apart, build_ours, build_published
from sid_ray.config import Config, load_config


class Variant(NamedTuple):
    """A way of ours to make the iteration, and how much better it has to be."""

    settings: dict[str, Any]
    target: float


FP32 = {"engine.precision": "fp32", "engine.zero_stage": 0}
TIMES = {
    "fp32": Variant(FP32, 1.05),
    "fp32, shared latents": Variant(FP32 | {"method.latents": "shared"}, 1.12),
    "bf16": Variant({"engine.precision": "bf16", "engine.zero_stage": 1}, 1.9),
}
"""Published seconds over ours, at least."""
MEMORY = {"fp32, minimal": Variant(FP32 | {"method.memory": "minimal"}, 0.6)}
"""Our peak memory over the published, at most."""


def configuration(preset: str, batch: int, settings: dict[str, Any]) -> Config:
    """A preset with one micro-batch, a random teacher and these settings."""
    sizes = {"batch.size": batch, "engine.micro_batch": batch, "teacher.random": True}
    return load_config(preset, sizes | FP32 | settings)


def compare_times(preset: str, batch: int, rounds: int, threads: int, variant: Variant) -> dict[str, Any]:
    """Medians of seconds per image over rounds after one to warm up, and of the ratio of the two in each round."""
    common = {"threads": threads, "batch": batch}
    theirs = Apart(build_published, configuration(preset, batch, {}), **common)
    ours = Apart(build_ours, configuration(preset, batch, variant.settings), **common)
    pairs = [(theirs.iterate(), ours.iterate()) for _ in range(rounds + 1)][1:]
    ratios = [a / b for a, b in pairs]
    published, own = theirs.end(), ours.end()
    return {
        "published_seconds_per_image": statistics.median(a for a, _ in pairs) / batch,
        "seconds_per_image": statistics.median(b for _, b in pairs) / batch,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "target": variant.target,
        "published_peak_memory": published.peak_memory,
        "peak_memory": own.peak_memory,
    }


def compare_memory(preset: str, batch: int, threads: int, variant: Variant) -> dict[str, Any]:
    """Peak resident bytes of a process with one iteration, ours over the published."""
    peaks = []
    for build, settings in ((build_published, {}), (build_ours, variant.settings)):
        process = Apart(build, configuration(preset, batch, settings), threads=threads, batch=batch)
        process.iterate()
        peaks.append(process.end().peak_memory)
    return {
        "published_peak_memory": peaks[0],
        "peak_memory": peaks[1],
        "ratio": peaks[1] / peaks[0],
        "target": variant.target,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-uncond")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="0: no times")
    parser.add_argument("--memory-batch", type=int, default=32, help="0: no memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    document: dict[str, Any] = {"preset": given.preset, "batch": given.batch, "memory_batch": given.memory_batch}
    document["times"] = {
        name: compare_times(given.preset, given.batch, given.rounds, given.threads, variant)
        for name, variant in (TIMES.items() if given.rounds else ())
    }
    document["memory"] = {
        name: compare_memory(given.preset, given.memory_batch, given.threads, variant)
        for name, variant in (MEMORY.items() if given.memory_batch else ())
    }
    if given.json:
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(document)))


def table(document: dict[str, Any]) -> list[str]:
    """Markdown rows."""
    lines = ["| variant | published | ours | ratio | range | target |", "|---|---|---|---|---|---|"]
    for name, row in document["times"].items():
        seconds = f"{row['published_seconds_per_image']:.3g} s/image | {row['seconds_per_image']:.3g} s/image"
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f}"
        lines.append(f"| {name} | {seconds} | {row['ratio']:.2f} | {spread} | at least {row['target']} |")
    for name, row in document["memory"].items():
        peaks = f"{row['published_peak_memory'] / 1e9:.2f} GB | {row['peak_memory'] / 1e9:.2f} GB"
        lines.append(f"| {name} | {peaks} | {row['ratio']:.2f} | | at most {row['target']} |")
    return lines


if __name__ == "__main__":
    main()
