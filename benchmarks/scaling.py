"""Images per second on 1 and on 2 workers, one thread each: the same global batch, by `sid-ray bench` under torchrun.

    python -m benchmarks.scaling [--preset cifar10-uncond] [--batch 4] [--workers 1,2] [--rounds 3] [--json FILE]

Rounds go through the numbers of workers in turn, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STAGES = (1, 2, 3)


def measure(preset: str, batch: int, workers: int, stage: int) -> float:
    """Images per second of the whole group."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        options = {
            "batch.size": batch,
            "engine.micro_batch": batch // workers,
            "engine.zero_stage": stage,
            "engine.precision": "fp32",
            "teacher.random": "true",
            "cluster.cpus_per_worker": 1,
        }
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        command = [*launcher, "-m", "sid_ray", "bench", preset, "--json", str(file), "--repeat", "3", "--warm-up", "1"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(file.read_text())["images_per_second"])


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-uncond")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    numbers = [int(n) for n in given.workers.split(",")]
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        speeds: dict[int, list[float]] = {n: [] for n in numbers}
        for _ in range(given.rounds):
            for n in numbers:
                speeds[n].append(measure(given.preset, given.batch, n, stage))
        base = statistics.median(speeds[numbers[0]])
        for n in numbers:
            speed = statistics.median(speeds[n])
            efficiency = speed / base * numbers[0] / n
            rows.append({"stage": stage, "workers": n, "images_per_second": speed, "efficiency": efficiency})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("| ZeRO | workers | images/s | of ideal |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['stage']} | {row['workers']} | {row['images_per_second']:.3g} | {row['efficiency']:.0%} |")


if __name__ == "__main__":
    main()
