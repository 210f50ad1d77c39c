"""`distill`: the main job, on Ray Train.

The driver checks everything, then Ray starts the workers, and each lives `training.worker.run_worker`. `fit`
runs in a thread of its own, because on the main thread it would take SIGINT for itself and abort the workers;
the main thread shows progress and turns the first Ctrl-C into a stop with a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sid_ray.config import Config, load_config, override
from sid_ray.errors import UserError
from sid_ray.launch.console import Display, cautions
from sid_ray.launch.ray_start import start_ray
from sid_ray.teachers.modules import Handed
from sid_ray.training.checkpoints import complete_checkpoints
from sid_ray.training.guard import TrainingStopped
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory, absolute_paths, check_workers, open_run

POLL_SECONDS = 0.2


class DistillationFailed(Exception):
    """The workers failed; the message is for the user, the traceback lies in the run's error.log."""


@dataclass(frozen=True)
class DistillResult:
    """How a run ended."""

    path: str
    """The run directory."""
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
    run, changed = open_run(config, handed)
    display = Display(config.run.total_kimg, quiet)
    try:
        progress = finished_run(config, run) or _launch(config, run, changed, display, handed)
    finally:
        display.close()
    return DistillResult(
        path=str(run.path),
        metrics=progress.model_dump(),
        generator=str(run.generator),
        finished=progress.nimg >= config.total_nimg,
    )


def finished_run(config: Config, run: RunDirectory) -> Progress | None:
    """The counters of a run that has nothing left to do; None if there is work."""
    if not run.summary.is_file():
        return None
    progress = Progress.model_validate_json(run.summary.read_text(encoding="utf-8"))
    return progress if progress.nimg >= config.total_nimg else None


def _launch(config: Config, run: RunDirectory, changed: list[str], display: Display, handed: Handed) -> Progress:
    _describe_start(config, run, changed, display)
    ray = _start_ray(config)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from sid_ray.launch.bulletin import Bulletin

    workers, use_gpu = resolve_workers(config, int(ray.cluster_resources().get("GPU", 0)))
    check_workers(config, workers)
    display.note(f"{workers} worker(s) on {'GPU' if use_gpu else 'CPU'}; Ctrl-C stops with a checkpoint")
    bulletin = ray.remote(Bulletin).options(num_cpus=0).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(),
            "run": str(run.path),
            "bulletin": bulletin,
            "import_path": [os.getcwd(), *sys.path],
            "handed": ray.put(handed),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=_resources(config, use_gpu)
        ),
        run_config=RunConfig(
            name="train",
            # A fresh name per launch: checkpoints are ours, and Ray must not find records of its own.
            storage_path=str(run.ray / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    return _follow(trainer, bulletin, run, display)


def _worker(settings: dict[str, Any]) -> None:
    """What every Ray worker runs."""
    from sid_ray.config import parse_config
    from sid_ray.launch.bulletin import RayOutside
    from sid_ray.training.worker import run_worker

    outside, run = RayOutside(settings["bulletin"]), RunDirectory(Path(settings["run"]))
    import ray

    try:
        # The user's own code is found here as it was there; only then can its modules be read.
        sys.path += [path for path in settings["import_path"] if path not in sys.path]
        handed = ray.get(settings["handed"])
        progress = run_worker(parse_config(settings["config"]), run, outside, handed)
    except TrainingStopped as stop:  # on every worker alike; raised further, Ray would start them again
        ray.get(outside.bulletin.fail.remote(type(stop).__name__, str(stop)))
        return
    except Exception as error:
        if not isinstance(error, UserError):
            run.error_log.write_text(traceback.format_exc(), encoding="utf-8")
        ray.get(outside.bulletin.fail.remote(type(error).__name__, str(error)))
        raise
    if outside.first:
        ray.get(outside.bulletin.end.remote(progress.model_dump()))


def resolve_workers(config: Config, gpus: int) -> tuple[int, bool]:
    """(number of workers, whether each gets a GPU) on a cluster with this many GPUs. UserError if it cannot be."""
    wanted, use_gpu = config.cluster.workers, config.cluster.use_gpu
    if use_gpu is True and not gpus:
        raise UserError("cluster.use_gpu: true, but the cluster has no GPU; allowed: auto or false")
    on_gpu = bool(gpus) if use_gpu == "auto" else bool(use_gpu)
    return (gpus if on_gpu else 2) if wanted == "auto" else wanted, on_gpu


def _resources(config: Config, use_gpu: bool) -> dict[str, float]:
    return {"CPU": float(config.cluster.cpus_per_worker)} | ({"GPU": 1.0} if use_gpu else {})


def _start_ray(config: Config) -> Any:
    """Connect to the cluster this runs on, or start one on this machine."""
    for name, value in {
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # it also paces reports
    }.items():
        os.environ.setdefault(name, value)
    import logging

    workers = config.cluster.workers if isinstance(config.cluster.workers, int) else 2
    ray = start_ray(workers * config.cluster.cpus_per_worker)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    return ray


def _follow(trainer: Any, bulletin: Any, run: RunDirectory, display: Display) -> Progress:
    """Run `fit` in a thread; show progress and pass on the wish to stop, until it ends."""
    import ray

    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
    with _StopSignals(bulletin, display):
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            for report in ray.get(bulletin.read.remote()):
                display.note(report) if isinstance(report, str) else display.update(report)
    failure, outcome = ray.get(bulletin.result.remote())
    if outcome is not None:
        return Progress.model_validate(outcome)
    kind, message = failure or ("", str(errors[0] if errors else "the workers ended without a result"))
    if kind == "UserError":
        raise UserError(message)
    if kind == "TrainingStopped":
        raise TrainingStopped(message)
    if errors and not failure:
        run.error_log.write_text("".join(traceback.format_exception(errors[0])), encoding="utf-8")
    first_line = message.strip().splitlines()[0] if message.strip() else kind
    raise DistillationFailed(f"the workers failed: {f'{kind}: ' if kind else ''}{first_line}\nDetails: {run.error_log}")


class _StopSignals:
    """While active, SIGINT and SIGTERM ask the workers to stop; a second one aborts."""

    def __init__(self, bulletin: Any, display: Display):
        self.bulletin, self.display, self.asked = bulletin, display, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.display.note("stopping: the workers write a checkpoint and leave (again to abort)")
        self.bulletin.stop.remote()


def _describe_start(config: Config, run: RunDirectory, changed: list[str], display: Display) -> None:
    newest = next(iter(complete_checkpoints(run.checkpoints)), None)
    if newest is None:
        display.note(f"new run in {run.path}")
    else:
        display.note(f"resuming {run.path} from {newest.name}")
    for text in cautions(config):
        display.note(f"caution: {text}")
    for text in changed:
        display.note(f"changed since: {text}")
