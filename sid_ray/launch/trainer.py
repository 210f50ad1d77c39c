"""`distill`: the main job, on Ray Train.

The driver checks everything, then Ray starts the workers, and each lives `training.worker.run_worker`. The driver
follows them (`launch.following`) and launches them again when they left with a checkpoint before the end.
"""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

from torch import nn

from sid_ray.config import Config, load_config, override
from sid_ray.errors import UserError
from sid_ray.launch.console import Display, cautions
from sid_ray.launch.following import Growth, Launch, Stop, StopSignals, Viewer
from sid_ray.launch.ray_start import extend_import_path, import_path, set_defaults, start_ray
from sid_ray.storage.lease import Taken
from sid_ray.teachers.modules import Handed
from sid_ray.training.checkpoints import complete_names
from sid_ray.training.guard import TrainingStopped
from sid_ray.training.opening import absolute_paths, check_workers, claim, open_run
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory

START_SECONDS = 30
"""How long Ray waits for a worker group's place before it looks at the cluster again."""
NO_ROOM = (
    "evaluation.mode async, but there is no room for one more beside the workers: unless some comes, they measure "
    "themselves, some evaluations later"
)
STARTS = 120
"""How often a group may fail to start: an hour of waiting for machines."""


@dataclass(frozen=True)
class DistillResult:
    """How a run ended."""

    path: str
    """The run directory, local or on S3."""
    metrics: dict[str, Any]
    """The final counters (`training.progress.Progress`): nimg, fid, best_fid, teacher_fid, ..."""
    generator: str
    """Model directory of the best generator."""
    finished: bool
    """Whether run.total_kimg was reached; else the same call goes on."""


def distill(
    preset_or_yaml: str | Config,
    overrides: Mapping[str, Any] | None = None,
    *,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    quiet: bool = False,
) -> DistillResult:
    """Distil a teacher into a one-step generator; the same call again resumes.

    `preset_or_yaml`: a preset's name, a YAML file, or a `Config`. `overrides`: dotted fields. `teacher`: any module
    with the attributes and the call of `sid_ray.Denoiser`, instead of the one that `teacher.path` names. `student`:
    the network that generator and fake score start from, after a fit to the teacher (`init.fit_kimg`); required if
    the teacher has no parameters of its own. Both are copied. UserError before anything starts if the configuration
    cannot run; DistillationFailed if the workers fail; TrainingStopped if the guard ends the run.
    """
    handed = Handed.of(teacher, student)
    named = {**(overrides or {}), **handed.fields()}
    if isinstance(preset_or_yaml, Config):
        config = absolute_paths(override(preset_or_yaml, named))
    else:
        config = absolute_paths(load_config(preset_or_yaml, named))
    display = Display(config.run.total_kimg, quiet)
    return run_job(config, handed, display, StopSignals(display.note))


def run_job(config: Config, handed: Handed, display: Viewer, stopping: AbstractContextManager[Stop]) -> DistillResult:
    """The job behind `distill`, whoever watches it and may stop it; `config` has absolute paths.

    Raises what `distill` raises.
    """
    lost: list[str] = []
    with closing(display), claim(config, display.note, lost.append, handed) as lease:
        run, changed = open_run(config, lease.owner, handed)
        progress = finished_run(config, run) or _launch(config, run, changed, display, stopping, handed, lost)
    return DistillResult(
        path=run.address(run.path),
        metrics=progress.model_dump(),
        generator=run.address(run.generator),
        finished=progress.nimg >= config.total_nimg,
    )


def finished_run(config: Config, run: RunDirectory) -> Progress | None:
    """The counters of a run that has nothing left to do; None if there is work."""
    if not run.summary.is_file():
        return None
    progress = Progress.model_validate_json(run.summary.read_text(encoding="utf-8"))
    return progress if progress.nimg >= config.total_nimg else None


def _launch(
    config: Config,
    run: RunDirectory,
    changed: list[str],
    display: Viewer,
    stopping: AbstractContextManager[Stop],
    handed: Handed,
    lost: list[str],
) -> Progress:
    """Launch worker groups until the run is finished or somebody asked for a stop.

    Workers that leave for another reason (a machine is taken away, there is room for more) have written a
    checkpoint; the next launch goes on from it, on the machines that are there then. `lost` gets a text
    when another process has taken over the run.
    """
    _describe_start(config, run, changed, display)
    ray = _start_ray(config)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers, use_gpu = resolve_workers(config, gpus, may_grow="RAY_ADDRESS" in os.environ)
    check_workers(config, workers[0])
    most, resources = workers[1], _resources(config, use_gpu)
    count = f"{most}" if workers[0] == most else f"{workers[0]} to {most}"
    display.note(f"{count} worker(s) on {'GPU' if use_gpu else 'CPU'}; Ctrl-C stops with a checkpoint")
    growth = Growth(most, resources, config.cluster.resize_seconds)
    job = {"config": config.model_dump(), "owner": run.owner, "import_path": import_path()}
    job |= {"handed": ray.put(handed), "resources": resources}
    if config.evaluation.mode == "async" and not _room_beside(ray.cluster_resources(), workers[0], resources):
        display.note(f"caution: {NO_ROOM}")
    failures = 0
    with stopping as stop:
        while True:
            launch = Launch(run, display, stop, growth, lost, config.cluster.max_failures, failures)
            bulletin = _beside_the_driver()
            left = max(0, config.cluster.max_failures - failures)
            trainer = _trainer(config, run, job | {"bulletin": bulletin}, workers, use_gpu, left)
            progress, reason = launch.follow(trainer, bulletin)
            failures += launch.failures
            if progress.nimg >= config.total_nimg or stop.asked:
                return progress
            display.note(f"{reason}: the workers left with a checkpoint at {progress.nimg / 1000:g} kimg; going on")


def _room_beside(there: dict[str, float], workers: int, per_worker: dict[str, float]) -> bool:
    """Whether a cluster has resources for one more than so many workers."""
    return all(there.get(name, 0.0) >= (workers + 1) * amount for name, amount in per_worker.items())


def _beside_the_driver() -> Any:
    """A bulletin on the driver's node, which no loss of workers touches."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from sid_ray.launch.bulletin import Bulletin

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Bulletin).options(num_cpus=0, scheduling_strategy=here).remote()


def _trainer(
    config: Config, run: RunDirectory, job: dict[str, Any], workers: tuple[int, int], use_gpu: bool, max_failures: int
) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    from sid_ray.launch.group import LossCallback, WorkerTorchConfig

    api: Any = ray.train  # its classes are chosen at run time; type checkers see older ones
    return TorchTrainer(
        _worker,
        train_loop_config=job,
        torch_config=WorkerTorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers,
            # Ray would resize by killing the workers, which loses what they did since their last checkpoint. It
            # chooses the size when a group starts; `Growth` restarts one with a checkpoint.
            elastic_resize_monitor_interval_s=float("inf"),
            use_gpu=use_gpu,
            resources_per_worker=_resources(config, use_gpu),
        ),
        run_config=api.RunConfig(
            name="train",
            # A fresh name per launch: checkpoints are ours, and Ray must not find records of its own.
            storage_path=str(run.ray / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:4]}"),
            callbacks=[LossCallback(job["bulletin"])],
            failure_config=api.FailureConfig(
                max_failures=max_failures,
                controller_failure_limit=STARTS,
                max_preemption_failures=-1,
            ),
        ),
    )


def _worker(settings: dict[str, Any]) -> None:
    """What every Ray worker runs. Raises what a restart may mend; Ray then restarts the group."""
    import ray

    from sid_ray.config import parse_config
    from sid_ray.launch.group import RayOutside
    from sid_ray.training.worker import run_worker

    config, outside = (
        parse_config(settings["config"]),
        RayOutside(settings["bulletin"], settings["resources"], settings["import_path"]),
    )
    run = RunDirectory.of(config, settings["owner"])
    if not outside.join():
        return
    try:
        # The user's own code is found here as it was there; only then can its modules be read.
        extend_import_path(settings["import_path"])
        handed = ray.get(settings["handed"])
        outside.end(run_worker(config, run, outside, handed).model_dump())
    except (UserError, TrainingStopped, Taken) as error:
        # All return: the run ends here. One alone: the others wait for it in a collective, and Ray must end them;
        # the group that it starts then is sent home by `join`.
        if not outside.all_give_up(error):
            raise
    except Exception:
        run.record_failure(f"worker {outside.rank} of {outside.size}", traceback.format_exc())
        raise


def resolve_workers(config: Config, gpus: int, may_grow: bool = False) -> tuple[tuple[int, int], bool]:
    """((fewest, most) workers, whether each gets a GPU) on a cluster with this many GPUs.

    `may_grow`: it is somebody's cluster, which may start machines when they are asked for. UserError if it cannot be.
    """
    use_gpu = config.cluster.use_gpu
    if use_gpu is True and not gpus and not (may_grow and config.cluster.worker_range):
        growing = ", or a number for cluster.workers if machines with GPUs are still to come" if may_grow else ""
        raise UserError(f"cluster.use_gpu: true, but the cluster has no GPU; allowed: auto or false{growing}")
    on_gpu = bool(gpus) if use_gpu == "auto" else bool(use_gpu)
    number = gpus if on_gpu else 2
    return config.cluster.worker_range or (number, number), on_gpu


def _resources(config: Config, use_gpu: bool) -> dict[str, float]:
    return {"CPU": float(config.cluster.cpus_per_worker)} | ({"GPU": 1.0} if use_gpu else {})


def _start_ray(config: Config) -> Any:
    """Connect to the cluster this runs on, or start one on this machine."""
    set_defaults(
        {
            "RAY_TRAIN_METRICS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # it also paces reports
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
            # A process that does not even answer (it is stopped, or its machine has gone) has no watchdog.
            "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(
                min(600.0, max(60.0, config.cluster.hang_timeout_seconds or 600.0))
            ),
        }
    )
    import logging

    fewest = (config.cluster.worker_range or (2, 2))[0]
    ray = start_ray(fewest * config.cluster.cpus_per_worker)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    return ray


def _describe_start(config: Config, run: RunDirectory, changed: list[str], display: Viewer) -> None:
    newest, address = next(iter(complete_names(run.depot)), None), run.address(run.path)
    if newest is None:
        display.note(f"new run in {address}")
    else:
        display.note(f"resuming {address} from {newest}")
    for text in cautions(config):
        display.note(f"caution: {text}")
    for text in changed:
        display.note(f"changed since: {text}")
