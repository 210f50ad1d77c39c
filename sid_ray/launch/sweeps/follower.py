"""The sweep's side of Ray Tune: what to run next, what to stop, and what to write down of it.

Tune's own records (pickles) are not used: the journal is read at the start, and everything that has to remember
(the stoppers, the search) is told again what it says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from sid_ray.config import Config
from sid_ray.errors import UserError
from sid_ray.launch.sweeps.journal import Journal, State, TrialRecord
from sid_ray.launch.sweeps.search import Proposals, Unit, units
from sid_ray.launch.sweeps.space import Space, Values
from sid_ray.launch.sweeps.stoppers import DivergenceStopper, PowerLawStopper

Show = Callable[[TrialRecord], None]


class Unpickled:
    """Tune pickles searchers and callbacks for a restore of its own, which is not used: an empty shell will do."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposer(Unpickled, Searcher):
    """Hands Tune the runs that are left, in order; none once the sweep is to stop."""

    def __init__(self, space: Space, journal: Journal, configure: Callable[[Unit, Values], Config], show: Show):
        super().__init__(metric="fid", mode="min")
        self.journal, self.configure, self.show = journal, configure, show
        self.proposals = Proposals(space, journal)
        self.left = [unit for unit in units(space) if not (r := journal.records.get(unit.name)) or not r.ended]
        self.stopping = False

    def suggest(self, trial_id: str) -> Any:
        """The settings of the next run. One whose values make no configuration is recorded as failed."""
        while self.left and not self.stopping:
            unit = self.left.pop(0)
            values = self.proposals.values(unit.number)
            before = self.journal.records.get(unit.name)
            record = before or TrialRecord(name=unit.name, number=unit.number, repeat=unit.repeat, values=values)
            try:
                config = self.configure(unit, values)
            except UserError as error:
                self._put(record, "failed", str(error))
                continue
            self._put(record, "running", "")
            return {"name": unit.name, "config": config.model_dump()}
        return Searcher.FINISHED

    def _put(self, record: TrialRecord, state: State, reason: str) -> None:
        record = record.model_copy(update={"state": state, "reason": reason})
        self.journal.put(record)
        self.show(record)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The journal knows already."""

    def save(self, checkpoint_path: str) -> None:
        """Tune wants to remember the search; the journal does."""

    def restore(self, checkpoint_path: str) -> None:
        """The journal is all there is."""


class Follower(Unpickled, Stopper, Callback):
    """Writes the journal, and gives trials up by the rules of the space.

    Tune asks it as a `Stopper` about each evaluation, and tells it as a `Callback` of starts and ends. Tune itself is
    never told to stop a trial: it would kill the trial's process, whose workers' place in the cluster is then freed
    by a helper of Ray's that needs a dashboard. `leave` asks the trial, which writes a checkpoint and ends by itself.
    """

    def __init__(self, space: Space, base: Config, journal: Journal, show: Show, leave: Callable[[str], None]):
        self.space, self.journal, self.show, self.leave = space, journal, show, leave
        self.budget = round(1000 * space.budget_kimg)
        self.divergence = DivergenceStopper(base.guard)
        self.power_law = PowerLawStopper(self.budget, space.grace_nimg)
        self.started: dict[str, float] = {}
        for record in journal.records.values():
            for nimg, fid in record.curve:
                self._judge(record.name, nimg, fid)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take an evaluation (or the end) of a trial."""
        record = self._timed(result["config"]["name"])
        if record.ended:  # it is on its way out
            return False
        if "failed" in result:
            self._put(record.model_copy(update={"state": "failed", "reason": result["failed"]}))
            return False
        if "fresh_fids" in result:
            ended: dict[str, Any] = {"state": "finished", "fresh_fids": result["fresh_fids"]}
            self._put(record.model_copy(update=ended if result["finished"] else {}))
            return False
        nimg, fid = result["nimg"], result["fid"]
        record = record.after(nimg, fid)
        verdict = self._judge(record.name, nimg, fid)
        if verdict is not None and nimg < self.budget:
            state, reason = verdict
            record = record.model_copy(update={"state": state, "reason": reason})
            self.leave(record.name)
        self._put(record)
        return False

    def give_up(self, name: str) -> None:
        """Tune's scheduler would stop this trial."""
        record = self.journal.records[name]
        if not record.ended:
            reason = f"lagged behind the others ({self.space.scheduler})"
            self.leave(name)
            self._put(record.model_copy(update={"state": "behind", "reason": reason}))

    def stop_all(self) -> bool:
        """Trials leave by themselves when the sweep is to stop."""
        return False

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its clock starts."""
        self.started[trial.config["name"]] = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It has left: finished, given up, or because the sweep is to stop."""
        self._put(self._timed(trial.config["name"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It failed; the sweep goes on."""
        record = self._timed(trial.config["name"])
        self._put(record.model_copy(update={"state": "failed", "reason": f"its process died: {trial.get_error()}"}))

    def _judge(self, name: str, nimg: int, fid: float) -> tuple[State, str] | None:
        """Both stoppers must see every evaluation; (state, reason) if the trial is to end."""
        result = {"nimg": nimg, "fid": fid}
        diverges, hopeless = self.divergence(name, result), self.power_law(name, result)
        if diverges and self.space.stop_diverged:
            return "diverged", f"FID {fid:.4g}, best {self.divergence.histories[name].best or fid:.4g}"
        if hopeless and self.space.power_law:
            return "behind", f"its power law cannot reach {self.power_law.target(name):.4g} by the end"
        return None

    def _timed(self, name: str) -> TrialRecord:
        """The record with the time that has passed since it was last touched."""
        record, now = self.journal.records[name], time.monotonic()
        passed = now - self.started.get(name, now)
        self.started[name] = now
        return record.model_copy(update={"seconds": record.seconds + passed})

    def _put(self, record: TrialRecord) -> None:
        self.journal.put(record)
        self.show(record)
