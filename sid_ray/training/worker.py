"""One worker's life: join the others, build or restore the networks, train, measure, leave.

Needs no Ray: `python -m sid_ray.training.worker CONFIG.yaml` runs it in a plain process or under torchrun.
"""

from __future__ import annotations

import sys

import torch

from sid_ray.config import Config, load_config
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training.board import Board
from sid_ray.training.checkpoints import NamedState, check_names, complete_checkpoints, read_network, read_progress
from sid_ray.training.distributed import World, join_world
from sid_ray.training.engines import Networks, build_networks
from sid_ray.training.evaluator import Evaluator
from sid_ray.training.guard import Diverged
from sid_ray.training.loop import Loop
from sid_ray.training.outside import Outside, PlainOutside
from sid_ray.training.progress import Progress
from sid_ray.training.rollback import discard_abandoned, read_rollbacks, refuse_to_go_on, roll_back, slowed
from sid_ray.training.run_directory import RunDirectory, check_workers, open_run, teacher_directory
from sid_ray.training.slots import SeededDraws, slots_of_rank
from sid_ray.training.step import Iteration


def run_worker(config: Config, run: RunDirectory, outside: Outside) -> Progress:
    """Train on this rank, from the newest complete checkpoint if there is one; returns the final counters.

    `config` and the run's directory have been checked (`open_run`). Every rank of the job calls this. A run that
    diverges and may roll back leaves and resumes here, as another process would. TrainingStopped if it may not.
    """
    torch.set_num_threads(config.cluster.cpus_per_worker)
    world = join_world()
    check_workers(config, world.size)
    while True:
        try:
            return _resume(config, run, outside, world)
        except Diverged as trouble:
            refuse_to_go_on(config, run, trouble)
            if world.is_first:
                rollback = roll_back(run, trouble)
                outside.note(f"{rollback}; learning rates x {config.guard.rollback_lr_factor**rollback.number:g}")
        world.barrier()


def _resume(config: Config, run: RunDirectory, outside: Outside, world: World) -> Progress:
    """Train from where the run stands to its end, or to a stop, or until it diverges (Diverged)."""
    if world.is_first:
        discard_abandoned(run)
    world.barrier()
    rollbacks = read_rollbacks(run)
    slots = slots_of_rank(config.num_slots, world.rank, world.size)
    networks, progress = restore_or_start(config, run, world, len(slots))
    progress.rollbacks = len(rollbacks)
    draws = SeededDraws(
        denoiser=networks.plain,
        micro_batch=config.engine.micro_batch,
        seed=config.run.seed,
        rollbacks=progress.rollbacks,
        p_mean=config.method.p_mean,
        p_std=config.method.p_std,
        tmax=config.method.tmax,
        device=world.device,
    )
    board = Board(run, config, progress.nimg, rollbacks) if world.is_first else None
    slower = slowed(config, progress.rollbacks)
    loop = Loop(
        config=slower,
        run=run,
        world=world,
        networks=networks,
        iteration=Iteration(slower, networks, draws, slots),
        evaluator=Evaluator(config, run, world, networks.plain),
        progress=progress,
        outside=outside,
        board=board,
    )
    try:
        if loop.train():
            loop.finish()
    finally:
        if board:
            board.close()
        networks.destroy()
    return progress


def restore_or_start(config: Config, run: RunDirectory, world: World, slots_per_rank: int) -> tuple[Networks, Progress]:
    """The networks as the newest complete checkpoint left them, or as they are before training. Collective."""
    path = teacher_directory(config, run)
    teacher, _ = load_denoiser(path, "teacher.path")
    generator, _ = load_denoiser(config.init.generator or path, "init.generator")
    fake_score, _ = load_denoiser(config.init.fake_score or path, "init.fake_score")
    checkpoint = next(iter(complete_checkpoints(run.checkpoints)), None)
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
    config = load_config(config_path)
    world = join_world()
    world.once(lambda: open_run(config))
    progress = run_worker(config, RunDirectory.of(config), PlainOutside())
    if world.is_first:
        print(f"at {progress.nimg / 1000:g} kimg: FID {progress.fid}, best {progress.best_fid}")


if __name__ == "__main__":
    main(sys.argv[1])
