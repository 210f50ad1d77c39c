"""One worker's life: join the others, build or restore the networks, train, measure, leave.

Needs no Ray: `python -m sid_ray.training.worker CONFIG.yaml` runs it in a plain process or under torchrun.
"""

from __future__ import annotations

import copy
import sys
from contextlib import ExitStack, nullcontext
from functools import partial

import torch

from sid_ray.config import Config, load_config
from sid_ray.storage.mirror import Mirror
from sid_ray.teachers.modules import Handed
from sid_ray.teachers.start import Start
from sid_ray.training.best_effort import BestEffort
from sid_ray.training.board import Board
from sid_ray.training.checkpoints import NamedState, check_names, read_network, read_progress, restore
from sid_ray.training.distributed import World, join_world
from sid_ray.training.evaluations import evaluations
from sid_ray.training.evaluator import Evaluator
from sid_ray.training.fit import fitted_student
from sid_ray.training.guard import Diverged
from sid_ray.training.loop import Loop
from sid_ray.training.networks import Networks, build_networks
from sid_ray.training.opening import check_workers, claim, open_run
from sid_ray.training.outside import Outside, PlainOutside
from sid_ray.training.progress import Progress
from sid_ray.training.rollback import discard_abandoned, refuse_to_go_on, roll_back, slowed
from sid_ray.training.run_directory import RunDirectory, start_of
from sid_ray.training.settling import settle
from sid_ray.training.slots import SeededDraws, slots_of_rank
from sid_ray.training.step import Iteration
from sid_ray.training.watchdog import Watchdog


def run_worker(config: Config, run: RunDirectory, outside: Outside, handed: Handed = Handed()) -> Progress:
    """Train on this rank, from the newest complete checkpoint if there is one; returns the final counters.

    `config` and the run's directory have been checked (`open_run`). `handed`: networks that a Python program handed
    over. Every rank of the job calls this. A run that diverges and may roll back leaves and resumes here, as another
    process would; TrainingStopped if it may not.
    """
    torch.set_num_threads(config.cluster.cpus_per_worker)
    world = join_world()
    check_workers(config, world.size)
    run.pull()
    world.barrier()
    config = settle(config, run, start_of(config, run, handed), world, outside)
    check_workers(config, world.size)
    mirror = run.mirror(outside.note) if world.is_first else None
    with mirror or nullcontext():
        while True:
            try:
                return _resume(config, run, outside, handed, world, mirror)
            except Diverged as trouble:
                refuse_to_go_on(config, run, trouble)
                rollback = world.once(partial(roll_back, run, mirror, trouble))
            if world.is_first:
                factor = config.guard.rollback_lr_factor**rollback.number
                outside.note(f"{rollback}; learning rates x {factor:g}")


def _resume(
    config: Config, run: RunDirectory, outside: Outside, handed: Handed, world: World, mirror: Mirror | None
) -> Progress:
    """Train from where the run stands to its end, or to a stop, or until it diverges (Diverged)."""
    rollbacks = world.once(lambda: discard_abandoned(run))
    slots = slots_of_rank(config.num_slots, world.rank, world.size)
    start = start_of(config, run, handed)
    restored = restore_or_start(config, run, start, world, len(slots), outside)
    if restored is None:
        return Progress()
    networks, progress = restored
    progress.rollbacks = len(rollbacks)
    draws = SeededDraws.of(config, networks.plain, progress.rollbacks, world.device)
    attempt = BestEffort(outside.note)
    board = Board(run, config, progress.nimg, attempt, rollbacks) if world.is_first else None
    watchdog = Watchdog(config.cluster.hang_timeout_seconds, run.error_log, f"worker {world.rank} of {world.size}")
    slower = slowed(config, progress.rollbacks)
    evaluator = Evaluator(config, run, start, world, networks.plain)
    loop = Loop(
        config=slower,
        run=run,
        world=world,
        networks=networks,
        iteration=Iteration(slower, networks, draws, slots),
        evaluator=evaluator,
        evaluations=evaluations(config, run, world, evaluator, progress, outside, attempt),
        progress=progress,
        outside=outside,
        attempt=attempt,
        board=board,
        mirror=mirror,
        watchdog=watchdog,
    )
    try:
        if loop.train():
            loop.finish()
    finally:
        watchdog.close()
        if board:
            board.close()
        networks.destroy()
    return progress


def restore_or_start(
    config: Config, run: RunDirectory, start: Start, world: World, slots_per_rank: int, outside: Outside
) -> tuple[Networks, Progress] | None:
    """The networks as the newest complete checkpoint left them, or as they are before training. Collective.

    None if somebody asked to stop before they were ready.
    """
    (teacher, _), (student, _) = start.teacher(), start.student()
    if start.needs_fit and not fitted_student(config, run, teacher, student, world, outside):
        return None
    generator, fake_score = start.role("generator", copy.deepcopy(student)), start.role("fake_score", student)
    checkpoint = restore(run.depot, world, outside.note)
    progress, states = Progress(), dict[str, NamedState]()
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        for role, network in (("generator", generator), ("fake_score", fake_score)):
            states[role] = read_network(checkpoint, role)
            check_names(states[role], network, checkpoint)
            weights = {name: tensors["weight"] for name, tensors in states[role].items()}
            network.load_state_dict(network.state_dict() | weights, strict=True)
    networks = build_networks(config, world, slots_per_rank, teacher, generator, fake_score)
    if checkpoint is not None:
        networks.generator.load(states["generator"], progress.generator_steps)
        networks.fake_score.load(states["fake_score"], progress.fake_score_steps)
    world.barrier()
    return networks, progress


def main(config_path: str) -> None:
    """Run a configuration without Ray."""
    config, outside = load_config(config_path), PlainOutside()
    world = join_world()
    with ExitStack() as stack:

        def begin() -> str:
            lease = stack.enter_context(claim(config, outside.note, lambda reason: outside.stop.set()))
            _, changed = open_run(config, lease.owner)
            for text in changed:
                outside.note(f"changed since: {text}")
            return lease.owner

        owner = world.once(begin)
        progress = run_worker(config, RunDirectory.of(config, owner), outside)
    if world.is_first:
        print(f"at {progress.nimg / 1000:g} kimg: FID {progress.fid}, best {progress.best_fid}")


if __name__ == "__main__":
    main(sys.argv[1])
