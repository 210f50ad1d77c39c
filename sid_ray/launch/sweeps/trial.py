"""A trial: the job behind `sid-ray distill`, started from one of Ray Tune's trials, which it reports to."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from sid_ray.config import parse_config
from sid_ray.errors import UserError
from sid_ray.launch.following import DistillationFailed, Stop
from sid_ray.launch.ray_start import extend_import_path
from sid_ray.storage.lease import Taken
from sid_ray.training.guard import TrainingStopped

ASK_SECONDS = 1.0


class Wishes:
    """A small Ray actor: which trials are to stop."""

    def __init__(self) -> None:
        self.all, self.names = False, set[str]()

    def stop_all(self) -> None:
        """All trials are to write a checkpoint and leave."""
        self.all = True

    def stop(self, name: str) -> None:
        """One of them is."""
        self.names.add(name)

    def asked(self, name: str) -> bool:
        """Whether this one is."""
        return self.all or name in self.names


class AskWishes(Stop):
    """A trial's side of `Wishes`, a context manager as `StopSignals` is."""

    def __init__(self, wishes: Any, name: str):
        self.wishes, self.name, self.known, self.next_time = wishes, name, False, 0.0

    @property
    def asked(self) -> bool:
        """Whether the trial is to stop, as of a second ago."""
        import ray

        if not self.known and time.monotonic() >= self.next_time:
            self.known = bool(ray.get(self.wishes.asked.remote(self.name)))
            self.next_time = time.monotonic() + ASK_SECONDS
        return self.known

    def __enter__(self) -> AskWishes:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class TuneViewer:
    """Passes each new FID on to Ray Tune."""

    def note(self, text: str) -> None:
        """Nobody reads it."""

    def update(self, report: dict[str, Any]) -> None:
        """Report an evaluation."""
        import ray.tune

        if report["new_fid"] is not None:
            ray.tune.report({"nimg": report["new_fid_nimg"], "fid": float(report["new_fid"])})

    def close(self) -> None:
        """Nothing follows."""


def run_trial(settings: dict[str, Any], job: dict[str, Any]) -> None:
    """The function that Tune runs for each trial. `settings`: the configuration; `job`: what trials share."""
    import ray.tune

    from sid_ray.launch.trainer import run_job
    from sid_ray.teachers.modules import Handed

    extend_import_path(job["import_path"])
    if job["ray_address"] is not None:
        os.environ["RAY_ADDRESS"] = job["ray_address"]  # as on the driver: it tells a cluster that may grow
    try:
        result = run_job(
            parse_config(settings["config"]), Handed(), TuneViewer(), AskWishes(job["wishes"], settings["name"])
        )
    except (UserError, TrainingStopped, DistillationFailed, Taken) as error:
        ray.tune.report({"nimg": 0, "fid": math.nan, "failed": str(error)})
        return
    m = result.metrics
    fid = math.nan if m["fid"] is None else m["fid"]
    ray.tune.report({"nimg": m["nimg"], "fid": fid, "finished": result.finished, "fresh_fids": m["confirmed_fids"]})
