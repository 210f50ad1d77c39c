"""What Ray and DeepSpeed cost: seconds per iteration against the same loop in plain PyTorch, and the start of a run.

    python -m benchmarks.overheads loop [--preset digits] [--batch 128] [--rounds 20] [--threads 1] [--json FILE]
    python -m benchmarks.overheads job [--preset digits] [--kimg 12.8] [--json FILE]
    python -m benchmarks.overheads start [--preset digits] [--repeat 3] [--json FILE]

`loop`: our step with engines against the same step without (`benchmarks/plain.py`), interleaved in two processes.
`job`: images per second that a whole run on Ray with one worker reports in its last third, against the same worker in a
plain process. `start`: import, ray.init, a worker's networks, its first iteration, a whole run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.apart import Apart, Iterate, build_ours
from benchmarks.compare import configuration

NO_EXTRAS = {
    "evaluation.num_images": 0,
    "run.sample_images": 0,
    "cluster.workers": 1,
    "cluster.use_gpu": False,
}


def build_plain(config: Any) -> Iterate:
    """The same iteration without engines: our step, torch's Adam, an average in the plain."""
    from benchmarks.plain import plain_iteration

    return plain_iteration(config)


def loop(preset: str, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds per iteration of both, turn by turn; their ratio is what the engines cost."""
    config = configuration(preset, batch, {})
    plain = Apart(build_plain, config, threads=threads, batch=batch)
    ours = Apart(build_ours, config, threads=threads, batch=batch)
    pairs = [(plain.iterate(), ours.iterate()) for _ in range(rounds + 1)][1:]
    plain.end(), ours.end()
    return {
        "preset": preset,
        "batch": batch,
        "plain_seconds": statistics.median(a for a, _ in pairs),
        "engine_seconds": statistics.median(b for _, b in pairs),
        "slower_by": statistics.median(b / a for a, b in pairs) - 1,
    }


def job(preset: str, batch: int, kimg: float, threads: int) -> dict[str, Any]:
    """Images per second of a whole run with one worker: on Ray, and the same worker in a plain process."""
    from sid_ray.training.board import read_metrics

    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in (
            ("ray", [sys.executable, "-m", "sid_ray", "distill"]),
            ("process", [sys.executable, "-m", "sid_ray.training.worker"]),
        ):
            settings = NO_EXTRAS | {
                "run.name": name,
                "run.storage": folder,
                "run.total_kimg": kimg,
                "run.report_every_kimg": kimg / 12,
                "run.checkpoint_every_kimg": kimg,
                "cluster.cpus_per_worker": threads,
            }
            file = Path(folder) / f"{name}.yaml"
            file.write_text(configuration(preset, batch, settings).to_yaml(), encoding="utf-8")
            subprocess.run([*command, str(file)], check=True, stdout=subprocess.DEVNULL)
            rows = read_metrics(Path(folder) / name / "metrics.jsonl")
            told = [row["speed/images_per_second"] for row in rows if "speed/images_per_second" in row]
            speeds[name] = statistics.median(told[-len(told) // 3 :])
    return {"preset": preset, "images_per_second": speeds, "slower_by": speeds["process"] / speeds["ray"] - 1}


STARTS = {
    "python -c pass": "pass",
    "import sid_ray": "import sid_ray",
    "import torch": "import torch",
    "import deepspeed": "from sid_ray.training.engines import import_deepspeed; import_deepspeed()",
    "import ray": "import ray",
    "ray.init": "import ray; ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)",
    "a worker's networks": "from benchmarks.overheads import first_step; first_step({preset!r}, {batch}, False)",
    "and its first iteration": "from benchmarks.overheads import first_step; first_step({preset!r}, {batch}, True)",
}
"""What a process does from its start to its end, each with a part more than one before."""


def first_step(preset: str, batch: int, iterate: bool) -> None:
    """Build a worker's networks, and take a step."""
    iteration = build_ours(configuration(preset, batch, {}))
    if iterate:
        iteration(0)


def start(preset: str, batch: int, repeat: int) -> dict[str, Any]:
    """Median seconds of processes that do only a part of what a start does, of `sid-ray --help`, and of a whole run."""
    commands = {name: [sys.executable, "-c", code.format(preset=preset, batch=batch)] for name, code in STARTS.items()}
    commands["sid-ray --help"] = [sys.executable, "-m", "sid_ray", "--help"]
    seconds = {name: statistics.median(_run(command) for _ in range(repeat)) for name, command in commands.items()}
    with tempfile.TemporaryDirectory() as folder:
        settings = NO_EXTRAS | {"run.storage": folder, "run.total_kimg": batch / 1000}
        file = Path(folder) / "one.yaml"
        file.write_text(configuration(preset, batch, settings).to_yaml(), encoding="utf-8")
        seconds["a run of one iteration"] = _run([sys.executable, "-m", "sid_ray", "distill", str(file)])
    return {"preset": preset, "batch": batch, "seconds": seconds}


def _run(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure one of the three and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loop", "job", "start"])
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kimg", type=float, default=12.8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    match given.what:
        case "loop":
            document = loop(given.preset, given.batch, given.rounds, given.threads)
        case "job":
            document = job(given.preset, given.batch, given.kimg, given.threads)
        case _:
            document = start(given.preset, given.batch, given.repeat)
    text = json.dumps(document, indent=2)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
