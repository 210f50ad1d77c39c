"""`sweep`: Ray Tune over a space, each trial a distillation; the same call again goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sid_ray.errors import UserError
from sid_ray.launch.following import Background, DistillationFailed, StopSignals
from sid_ray.launch.sweeps.journal import Journal, TrialRecord
from sid_ray.launch.sweeps.plan import SweepPlan, check_same, plan_sweep
from sid_ray.launch.sweeps.report import write_report
from sid_ray.launch.sweeps.search import units
from sid_ray.launch.sweeps.shared import share
from sid_ray.launch.sweeps.table import SweepDisplay
from sid_ray.launch.sweeps.tuning import HEAD, build_tuner, start_ray_for, trials_at_once
from sid_ray.storage.lease import refuse_if_in_use, take_lease
from sid_ray.storage.s3 import StorageError

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SweepResult:
    """How a sweep stands."""

    path: str
    """Its folder, as a user would type it here, or its S3 address."""
    trials: list[TrialRecord]
    """What is known of each run, by name."""
    best: str | None
    """`best.yaml` there: the best settings, as a preset; None if no trial has an FID yet."""
    finished: bool
    """Whether all trials have ended; else the same call goes on."""


def sweep(space: str, overrides: Mapping[str, Any] | None = None, *, quiet: bool = False) -> SweepResult:
    """Run a tune space; the same call again goes on with the trials that have not ended.

    `space`: a YAML file, see `tune_spaces/`. `overrides`: dotted fields that all trials share. UserError before
    anything starts if it cannot run.
    """
    plan = plan_sweep(space, overrides)
    directory = plan.directory
    lost: list[str] = []
    display = SweepDisplay(plan.space, quiet)
    try:
        refuse_if_in_use(directory.lease, directory.address)
        directory.pull()
        check_same(plan, directory)
        with take_lease(directory.lease, directory.address, display.note, lost.append):
            directory.write("sweep.yaml", plan.recorded())
            journal = Journal(directory)
            _run(plan, journal, display, lost)
            best = write_report(plan, journal)
    except StorageError as error:
        raise UserError(f"run.storage: {directory.address}: {error}") from error
    finally:
        display.close()
    records = [journal.records[name] for name in sorted(journal.records)]
    ended = {record.name for record in records if record.ended}
    done = all(unit.name in ended for unit in units(plan.space))
    return SweepResult(directory.shown, records, best, done)


def _run(plan: SweepPlan, journal: Journal, display: SweepDisplay, lost: list[str]) -> None:
    """Run what has not ended, until it has or somebody asks to stop."""
    left = [unit for unit in units(plan.space) if not (r := journal.records.get(unit.name)) or not r.ended]
    display.begin(journal, plan.directory.shown)
    if not left:
        return
    shared = share(plan.base, plan.directory, display.note)
    ray = start_ray_for(plan, len(left))
    at_once = trials_at_once(plan, ray.nodes())
    display.note(f"{len(left)} of {len(units(plan.space))} runs to make, {at_once} at once; Ctrl-C stops resumably")

    from sid_ray.launch.sweeps.follower import Follower, Proposer
    from sid_ray.launch.sweeps.trial import Wishes

    wishes = ray.remote(Wishes).options(num_cpus=0, resources={HEAD: 0.001}).remote()
    proposer = Proposer(plan.space, journal, lambda unit, values: plan.config(unit, values, shared), display.show)
    follower = Follower(plan.space, plan.base, journal, display.show, wishes.stop.remote)
    tuner = build_tuner(plan, proposer, follower, wishes, at_once, len(left))
    with StopSignals(display.note) as stop:
        fit = Background(tuner.fit)
        while fit.is_running(POLL_SECONDS):
            display.refresh()
            if (stop.asked or lost) and not proposer.stopping:
                proposer.stopping = True
                ray.get(wishes.stop_all.remote())
    if lost:
        raise DistillationFailed(f"{plan.directory.address}: {lost[0]}; this process has stopped")
    if fit.error is not None:
        raise DistillationFailed(f"Ray Tune failed: {fit.error}") from fit.error
