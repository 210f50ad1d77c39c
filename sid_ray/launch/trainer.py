"""`distill`: the main job, on Ray Train.

The driver checks everything, then Ray starts the workers, and each lives `training.worker.run_worker`. `fit`
runs in a thread of its own, because on the main thread it would take SIGINT for itself and abort the workers;
the main thread shows progress and turns the first Ctrl-C into a stop with a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sid_ray.config import Config, load_config
from sid_ray.errors import UserError
from sid_ray.launch.console import Display, cautions
from sid_ray.storage.lease import Taken
from sid_ray.training.checkpoints import complete_names
from sid_ray.training.loop import TrainingStopped
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory, absolute_paths, check_workers, claim, open_run

POLL_SECONDS = 0.2


class DistillationFailed(Exception):
    """The workers failed; the message is for the user, the traceback lies in the run's error.log."""


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
    preset_or_yaml: str | Config, overrides: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> DistillResult:
    """Distil a teacher into a one-step generator; the same call again resumes.

    `preset_or_yaml`: a preset's name, a YAML file, or a `Config`. `overrides`: dotted fields. UserError before
    anything starts if the configuration cannot run; DistillationFailed if the workers fail; TrainingStopped if
    the guard ends the run.
    """
    config = preset_or_yaml if isinstance(preset_or_yaml, Config) else load_config(preset_or_yaml, overrides)
    config = absolute_paths(config)
    lost: list[str] = []
    with claim(config, lambda text: None if quiet else print(text, flush=True), lost.append) as lease:
        run, changed = open_run(config, lease.owner)
        display = Display(config.run.total_kimg, quiet)
        try:
            progress = finished_run(config, run) or _launch(config, run, changed, display, lost)
        finally:
            display.close()
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


def _launch(config: Config, run: RunDirectory, changed: list[str], display: Display, lost: list[str]) -> Progress:
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
        train_loop_config={"config": config.model_dump(), "owner": run.owner, "bulletin": bulletin},
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
    return _follow(trainer, bulletin, run, display, lost)


def _worker(settings: dict[str, Any]) -> None:
    """What every Ray worker runs."""
    from sid_ray.config import parse_config
    from sid_ray.launch.bulletin import RayOutside
    from sid_ray.training.worker import run_worker

    config, outside = parse_config(settings["config"]), RayOutside(settings["bulletin"])
    run = RunDirectory.of(config, settings["owner"])
    import ray

    try:
        progress = run_worker(config, run, outside)
    except Exception as error:
        if not isinstance(error, (UserError, TrainingStopped, Taken)):
            run.record_failure(traceback.format_exc())
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
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # it also paces reports
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    import ray

    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            workers = config.cluster.workers if isinstance(config.cluster.workers, int) else 2
            cpus = max(os.cpu_count() or 1, workers * config.cluster.cpus_per_worker)
            # "local": a cluster of our own, even if another one runs on this machine.
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    return ray


def _follow(trainer: Any, bulletin: Any, run: RunDirectory, display: Display, lost: list[str]) -> Progress:
    """Run `fit` in a thread; show progress and pass on the wish to stop, until it ends.

    `lost`: gets a text when another process has taken over the run.
    """
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
            if lost:
                bulletin.stop.remote()  # the workers notice it themselves then, and write nothing
    if lost:
        raise DistillationFailed(f"{run.address(run.path)}: {lost[0]}; this process has stopped and written nothing")
    failure, outcome = ray.get(bulletin.result.remote())
    if outcome is not None:
        return Progress.model_validate(outcome)
    kind, message = failure or ("", str(errors[0] if errors else "the workers ended without a result"))
    if kind == "UserError":
        raise UserError(message)
    if kind == "TrainingStopped":
        raise TrainingStopped(message)
    if kind == "Taken":
        raise DistillationFailed(message)
    if errors and not failure:
        run.record_failure("".join(traceback.format_exception(errors[0])))
    first_line = message.strip().splitlines()[0] if message.strip() else kind
    raise DistillationFailed(
        f"the workers failed: {f'{kind}: ' if kind else ''}{first_line}\nDetails: {run.address(run.error_log)}"
    )


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
    newest, address = next(iter(complete_names(run.depot)), None), run.address(run.path)
    if newest is None:
        display.note(f"new run in {address}")
    else:
        display.note(f"resuming {address} from {newest}")
    for text in cautions(config):
        display.note(f"caution: {text}")
    for text in changed:
        display.note(f"changed since: {text}")
