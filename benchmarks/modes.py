"""Peak memory of one iteration in each mode, against the published iteration in plain autograd.

    python -m benchmarks.modes [--preset cifar10-uncond] [--batch 16] [--threads 2] [--json FILE]

Each in a process of its own: its most resident bytes, networks, optimizers and libraries included. Beside it what a
rehearsal on the meta device counts for activations alone, which is what `engine.micro_batch auto` goes by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.apart import Apart, build_ours, build_published
from benchmarks.compare import FP32, configuration

BF16 = {"engine.precision": "bf16", "engine.zero_stage": 1}
MODES: dict[str, dict[str, Any]] = {
    "fast": {},
    "lean": {"method.memory": "lean"},
    "minimal": {"method.memory": "minimal"},
    "fast, checkpointing": {"engine.activation_checkpointing": True},
    "minimal, checkpointing": {"method.memory": "minimal", "engine.activation_checkpointing": True},
}


def measure(preset: str, batch: int, threads: int, build: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Peak resident bytes of a process that makes one iteration, and the activations that a rehearsal counts."""
    config = configuration(preset, batch, settings)
    process = Apart(build, config, threads=threads, batch=batch)
    process.iterate()
    row = {"peak_memory": process.end().peak_memory, "forwards": config.forwards, "activations": None}
    if build is build_ours:
        from sid_ray.training.rehearsal import rehearse
        from sid_ray.training.run_directory import RunDirectory, start_of

        row["activations"] = rehearse(config, start_of(config, RunDirectory.of(config)).check())
    return row


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-uncond")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="Rows, with ';', e.g. 'published, fp32;minimal, bf16'.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    jobs: dict[str, tuple[Any, dict[str, Any]]] = {"published, fp32": (build_published, {})}
    for precision, engine in (("fp32", FP32), ("bf16", BF16)):
        jobs |= {f"{mode}, {precision}": (build_ours, engine | settings) for mode, settings in MODES.items()}
    rows = {}
    for name in given.only.split(";") if given.only else jobs:
        rows[name] = measure(given.preset, given.batch, given.threads, *jobs[name])
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    if given.json:
        document = {"preset": given.preset, "batch": given.batch, "rows": rows}
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows; ratios are to the first one."""
    reference = next(iter(rows.values()))["peak_memory"]
    lines = [
        "| mode | forwards per image | peak, GB | of the published | activations counted, GB |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        counted = "" if row["activations"] is None else f"{row['activations'] / 1e9:.2f}"
        peak = row["peak_memory"]
        lines.append(f"| {name} | {row['forwards']} | {peak / 1e9:.2f} | {peak / reference:.2f} | {counted} |")
    return lines


if __name__ == "__main__":
    main()
