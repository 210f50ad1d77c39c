"""The same FID curve at every ZeRO stage and precision, on any number of workers.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/stages.py FOLDER

Runs the digits preset at every allowed combination, one after the other in one process group (no Ray), and prints
a markdown table. Run it with 1 and with 2 workers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sid_ray.config import load_config
from sid_ray.training.board import read_metrics
from sid_ray.training.opening import open_run
from sid_ray.training.outside import PlainOutside
from sid_ray.training.run_directory import RunDirectory
from sid_ray.training.worker import run_worker

COMBINATIONS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
KIMG = 6.4


def main(folder: Path) -> None:
    """Run all combinations into `folder`; the first worker prints the table."""
    from sid_ray.training.distributed import join_world

    world = join_world()
    rows = []
    for stage, precision in COMBINATIONS:
        name = f"stage{stage}-{precision}-on{world.size}"
        config = load_config(
            "digits",
            {
                "run.name": name,
                "run.storage": str(folder),
                "run.total_kimg": KIMG,
                "engine.zero_stage": stage,
                "engine.precision": precision,
                "evaluation.teacher_steps": 0,
                "evaluation.confirmations": 0,
            },
        )
        run = RunDirectory.of(config)
        world.once(lambda config=config: open_run(config))  # type: ignore[misc]
        run_worker(config, run, PlainOutside(quiet=True))
        if world.is_first:
            metrics = read_metrics(run.metrics)
            rows.append((name, {m["nimg"]: m["fid/generator"] for m in metrics if "fid/generator" in m}))
            print(name, rows[-1][1], flush=True)
    if world.is_first:
        print("| workers | stage | precision | " + " | ".join(f"{n / 1000:g} kimg" for n in rows[0][1]) + " |")
        print("|---|---|---|" + "---|" * len(rows[0][1]))
        for (stage, precision), (_, fids) in zip(COMBINATIONS, rows, strict=True):
            print(f"| {world.size} | {stage} | {precision} | " + " | ".join(f"{f:.3f}" for f in fids.values()) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
