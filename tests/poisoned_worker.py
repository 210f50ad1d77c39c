"""On ranks: runs whose draws are NaN for a while, one after the other in one process; see `main`."""

from __future__ import annotations

import gc
import json
import math
import sys

import torch

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.training import worker
from sid_ray.training.distributed import join_world
from sid_ray.training.guard import TrainingStopped
from sid_ray.training.opening import open_run
from sid_ray.training.outside import PlainOutside
from sid_ray.training.rollback import roll_back
from sid_ray.training.run_directory import RunDirectory
from sid_ray.training.slots import SeededDraws


class PoisonedDraws(SeededDraws):
    """NaN noise in every iteration that starts at `poison_from` images or later, in the first `lives` lives."""

    poison_from, lives = 0, 0

    def generator(self, nimg, slot):
        draws = super().generator(nimg, slot)
        if nimg >= self.poison_from and self.rollbacks < self.lives:
            draws.noise[0] = math.nan
        return draws


def leave_after_rollback(*arguments):
    """As a group of workers that ends right after the rollback was noted down."""
    roll_back(*arguments)
    raise UserError("left")


def living_bytes() -> int:
    """Memory of the tensors that the garbage collector finds."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def main(out: str, jobs: str) -> None:
    """`jobs`: JSON list of {config, poison_from, lives, leave}. Writes what each ended with, and the memory left."""
    world, results = join_world(), []
    for job in json.loads(jobs):
        PoisonedDraws.poison_from, PoisonedDraws.lives = job["poison_from"], job["lives"]
        worker.SeededDraws = PoisonedDraws
        worker.roll_back = leave_after_rollback if job.get("leave") else roll_back
        config = load_config(job["config"])
        world.once(lambda config=config: open_run(config))
        before, stopped = living_bytes(), ""
        try:
            worker.run_worker(config, RunDirectory.of(config), PlainOutside())
        except (TrainingStopped, UserError) as stop:
            stopped = str(stop)
        results.append({"stopped": stopped, "left": living_bytes() - before})
    if world.is_first:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
