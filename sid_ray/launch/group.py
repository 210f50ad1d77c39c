"""The worker group's side of Ray Train: what a worker sees of the outside, its signals, and losses.

Imported where Ray is: on the controller and in the workers.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig

from sid_ray.launch.ray_start import extend_import_path
from sid_ray.training.outside import Job, Outside

GIVE_UP_SECONDS = 10.0
TERMINATED = threading.Event()
"""Set in a worker process that was sent SIGTERM."""


class RayOutside(Outside):
    """A worker's surroundings under Ray Train: metrics go to Ray and to the bulletin, wishes to stop come back."""

    def __init__(self, bulletin: Any, resources: dict[str, float] | None = None, import_path: list[str] | None = None):
        """`resources`, `import_path`: what a job beside the training gets, and where it finds the user's code."""
        self.bulletin, self.resources, self.import_path = bulletin, resources or {"CPU": 1.0}, import_path or []
        self.jobs: dict[Any, str] = {}
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this worker speaks for the others."""
        return self.rank == 0

    def join(self) -> bool:
        """Say that this worker has started; returns whether there is anything to do."""
        return bool(ray.get(self.bulletin.join.remote(self.rank, self.size)))

    def report(self, metrics: dict[str, Any]) -> None:
        """Report to the driver (first worker) and to Ray (all, collectively); metrics only, no checkpoint."""
        if self.first:
            ray.get(self.bulletin.post.remote(metrics))
        ray.train.report({k: v for k, v in metrics.items() if v is not None})

    def note(self, text: str) -> None:
        """Tell the driver's terminal."""
        ray.get(self.bulletin.post.remote(text))

    def should_stop(self) -> bool:
        """Whether the driver asked to stop, a machine is to be taken away, or this process was sent SIGTERM."""
        reason = None
        if ray.train.get_preemption_info() is not None:  # collective
            reason = "a machine is being taken away"
        elif TERMINATED.is_set():
            reason = f"worker {self.rank} was sent SIGTERM"
        if reason is not None:
            ray.get(self.bulletin.leave.remote(reason))
            return True
        return self.first and bool(ray.get(self.bulletin.should_stop.remote()))

    def begin(self, name: str, job: Job) -> None:
        """Start it as a Ray task outside of the workers' own resources; it waits until there are others."""
        task: Any = ray.remote(_run_job).options(
            num_cpus=self.resources["CPU"],
            num_gpus=self.resources.get("GPU", 0),
            scheduling_strategy="DEFAULT",
        )
        # In a dictionary the job stays a reference: the user's code must be found before it is unpickled.
        self.jobs[task.remote({"import_path": self.import_path, "job": ray.put(job)})] = name

    def results(self) -> dict[str, float | None]:
        """Of the tasks that have ended."""
        if not self.jobs:
            return {}
        done, _ = ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=0)
        return {self.jobs.pop(task): self._result(task) for task in done}

    def _result(self, task: Any) -> float | None:
        try:
            return float(ray.get(task))
        except ray.exceptions.RayError as error:
            self.note(f"warning: an evaluation beside the training failed: {str(error).strip().splitlines()[-1]}")
            return None

    def forget(self) -> None:
        """Cancel the tasks."""
        for task in self.jobs:
            ray.cancel(task, force=True)
        self.jobs.clear()

    def all_give_up(self, error: Exception) -> bool:
        """Report what no restart can mend; returns whether all workers have met it, and none is left waiting."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < deadline:
            given_up = ray.get(self.bulletin.give_up.remote(self.rank, type(error).__name__, str(error)))
            if given_up == self.size:
                return True
            time.sleep(0.1)
        return False

    def end(self, outcome: dict[str, Any]) -> None:
        """Report how the run ended."""
        if self.first:
            ray.get(self.bulletin.end.remote(outcome))


def _run_job(settings: dict[str, Any]) -> float:
    """The task of a job beside the training."""
    extend_import_path(settings["import_path"])
    return float(ray.get(settings["job"])())


class LossCallback(ray.train.UserCallback):
    """Runs on Ray Train's controller: tells the bulletin when workers are lost."""

    def __init__(self, bulletin: Any):
        self.bulletin = bulletin

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """A worker has raised, or died."""
        ray.get(self.bulletin.lose.remote(describe_loss(worker_exceptions)))


def describe_loss(exceptions: dict[int, Exception]) -> str:
    """Who was lost, and why, in a line. When one dies the others fail for want of it: the dead are named first."""
    dead = [rank for rank, error in exceptions.items() if type(error).__name__.startswith("WorkerHealthCheck")]
    if dead:
        return f"worker {', '.join(map(str, dead))} died"
    rank, error = next(iter(exceptions.items()))
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"worker {rank} failed: {type(error).__name__}: {first_line}"


class _WorkerBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's torch backend, whose workers also heed SIGTERM.

    Ray's own handler ends the worker at once. The handler can only be set on the main thread, where this runs; the
    training function runs on another.
    """

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_heed_sigterm)


class WorkerTorchConfig(TorchConfig):
    """Ray's torch set-up with `_WorkerBackend`."""

    @property
    def backend_cls(self) -> type[_WorkerBackend]:
        """What sets the workers up."""
        return _WorkerBackend


def _heed_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda *_: TERMINATED.set())
