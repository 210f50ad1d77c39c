"""Many kills at random moments in one run: `python -m tests.faults.soak FOLDER [--kills 50] [--seed 0]`.

The digits job with a checkpoint every other iteration. Again and again a process of it gets SIGKILL: a random worker,
which Ray restarts, or the driver, whose command is then repeated. Half of the moments are a random time after a
worker group has started or before (in start-up, in the middle of a checkpoint, ...), half follow a new checkpoint, so
that the run gets on. When enough have been killed it is left alone, and must end bitwise as the undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from pathlib import Path

import psutil

from tests.faults.harness import checkpoints, launch, undisturbed
from tests.launching import SHORT
from tests.training.test_worker import assert_same, end_state

JOB = [
    *SHORT, "--run.total_kimg", "12.8", "--run.checkpoint_every_kimg", "0.256", "--run.keep_checkpoints", "3",
    "--evaluation.every_kimg", "12.8", "--evaluation.num_images", "50", "--cluster.max_failures", "100000",
]  # fmt: skip
DRIVER_SHARE = 0.2


def main() -> None:
    """Soak, say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    folder = chosen.folder.absolute()
    whole = folder / "undisturbed" / "runs" / "digits"
    if not (whole / "summary.json").is_file():
        undisturbed(folder / "undisturbed", JOB)
    (folder / "soaked").mkdir(parents=True)
    kills = soak(folder / "soaked", chosen.kills, random.Random(chosen.seed))
    assert_same(end_state(folder / "soaked" / "runs" / "digits"), end_state(whole))
    workers, drivers = kills.count("worker"), kills.count("driver")
    print(f"{len(kills)} kills ({workers} of workers, {drivers} of the driver), seed {chosen.seed}: bitwise equal")


def soak(folder: Path, wanted: int, dice: random.Random) -> list[str]:
    """Run the job to its end with at least so many kills; returns who was killed, in order."""
    run, kills, output = folder / "runs" / "digits", list[str](), folder / "output.txt"
    process = launch(folder, JOB, log=output)
    while len(kills) < wanted:
        wait(dice, process, run)
        if process.poll() is not None:
            assert not (run / "summary.json").exists(), f"the run was over after {len(kills)} kills; make it longer"
            raise AssertionError(f"the run ended by itself after {len(kills)} kills: see {output}")
        at = (checkpoints(run) or [0])[-1]
        workers = worker_processes(process)
        if dice.random() < DRIVER_SHARE or not workers:
            process.kill()
            process.wait()
            kills.append("driver")
            process = launch(folder, JOB, log=output)
        else:
            dice.choice(workers).kill()
            kills.append("worker")
        print(f"kill {len(kills)}: {kills[-1]}, newest checkpoint at {at} images", flush=True)
    assert process.wait(timeout=3600) == 0, f"see {output}"
    return kills


def wait(dice: random.Random, process: subprocess.Popen[str], run: Path) -> None:
    """Until the next kill: for a random time, or until shortly after a new checkpoint."""
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, 30))
        return
    before = checkpoints(run)[-1:]
    while checkpoints(run)[-1:] == before and process.poll() is None:
        time.sleep(0.02)
    time.sleep(dice.expovariate(2.0))


def worker_processes(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a driver's cluster in which Ray Train runs a worker."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
