"""Ray Tune as the sweep uses it: its settings, its schedulers, and how many trials fit."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from sid_ray.errors import UserError
from sid_ray.launch.ray_start import import_path, set_defaults, start_ray
from sid_ray.launch.sweeps.plan import SweepPlan
from sid_ray.launch.sweeps.space import Space
from sid_ray.launch.trainer import resolve_workers

HEAD = "node:__internal_head__"
"""What Ray calls the machine where the cluster began, which is not taken away; trials' drivers run there."""


def build_tuner(plan: SweepPlan, proposer: Any, follower: Any, wishes: Any, at_once: int, most: int) -> Any:
    """The `Tuner` of at most `most` runs, `at_once` of them at a time."""
    from ray import tune

    from sid_ray.launch.sweeps.trial import run_trial

    job = {"wishes": wishes, "import_path": import_path(), "ray_address": os.environ.get("RAY_ADDRESS")}
    trainable = tune.with_parameters(run_trial, job=job)
    return tune.Tuner(
        # A trial's own process only waits for its workers: it reserves nothing that they need.
        tune.with_resources(trainable, tune.PlacementGroupFactory([{HEAD: 0.001}])),
        tune_config=tune.TuneConfig(
            search_alg=proposer,
            scheduler=_scheduler(plan.space, follower.give_up),
            num_samples=most,
            max_concurrent_trials=at_once,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(
                plan.directory.path / ".ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
            ),
            stop=follower,
            callbacks=[follower],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _trial_name(trial: Any) -> str:
    return str(trial.config["name"])


def _scheduler(space: Space, give_up: Callable[[str], None]) -> Any:
    """Tune's scheduler, which compares trials at equal numbers of images; None is first in, first out."""
    from sid_ray.launch.sweeps.schedulers import GentleAsha, GentleMedian

    grace = max(1, round(space.grace_nimg))
    compare: dict[str, Any] = {"time_attr": "nimg", "metric": "fid", "mode": "min", "grace_period": grace}
    match space.scheduler:
        case "asha":
            # Beyond the budget: at it, a trial would be ended before its last measurements.
            return GentleAsha(give_up, **compare, max_t=round(2000 * space.budget_kimg), reduction_factor=3)
        case "median":
            return GentleMedian(give_up, **compare, min_samples_required=3)
        case "none":
            return None


def start_ray_for(plan: SweepPlan, left: int) -> Any:
    """Connect to Ray, or start it here, with room for the runs that are left; returns the `ray` module."""
    set_defaults(
        {
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "RAY_AIR_NEW_OUTPUT": "0",
            # A trial has some eight small processes; by default Ray warns of more than a few per core.
            "RAY_worker_maximum_startup_concurrency": str(4 * (os.cpu_count() or 1)),
        }
    )
    fewest = (plan.base.cluster.worker_range or (2, 2))[0]
    wanted = plan.space.trials_at_once
    at_once = min(left, wanted) if isinstance(wanted, int) else 1
    ray = start_ray(at_once * fewest * plan.base.cluster.cpus_per_worker)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    return ray


def trials_at_once(plan: SweepPlan, nodes: list[dict[str, Any]]) -> int:
    """How many trials run at a time, from Ray's list of machines: as many as have room for all their workers.

    A number in the space is taken at its word (more machines may come). UserError if not even one trial fits now and
    no number was given.
    """
    if isinstance(plan.space.trials_at_once, int):
        return plan.space.trials_at_once
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(r.get("GPU", 0) for r in resources))
    (fewest, _), use_gpu = resolve_workers(plan.base, gpus)
    per_worker = {"CPU": float(plan.base.cluster.cpus_per_worker)} | ({"GPU": 1.0} if use_gpu else {})
    places = sum(min(int(r.get(kind, 0) / amount) for kind, amount in per_worker.items()) for r in resources)
    if places < fewest:
        raise UserError(
            f"cluster.workers: a trial needs {fewest} worker(s) of {per_worker}, and there is room for {places} now; "
            "allowed: fewer workers, or a number for trials_at_once if machines are still to come"
        )
    return places // fewest
