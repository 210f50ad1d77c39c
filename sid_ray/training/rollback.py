"""Going back after a divergence, without changing any state in place: note it down, leave, resume.

`<run>/rollbacks.json` lists the rollbacks of a run. Adding one, which happens in one step, is the whole act:
checkpoints of the stretch that it abandons no longer count, whoever resumes and whenever; their number is part
of every seed and lowers the learning rates. So a worker that dies in between loses nothing.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict

from sid_ray.config import Config
from sid_ray.storage.mirror import Mirror
from sid_ray.teachers.model_directory import write_text
from sid_ray.training.checkpoints import best_name, complete_names, nimg_of
from sid_ray.training.guard import Diverged, TrainingStopped
from sid_ray.training.run_directory import RunDirectory, storage_errors

ADVICE = (
    "Try lower --optimizer.generator_lr and --optimizer.fake_score_lr, a --method.alpha nearer to 1, or "
    "--optimizer.gradient_clip 1.0, under another --run.name"
)


class Rollback(BaseModel):
    """An entry of `rollbacks.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    number: int
    """1 for the first."""
    from_nimg: int
    """Where the run had diverged."""
    to_nimg: int
    """The checkpoint it went back to; 0 is the beginning."""
    reason: str
    """What the guard noticed."""

    def __str__(self) -> str:
        """For a person, in one line."""
        return (
            f"rollback {self.number}: from {self.from_nimg / 1000:g} kimg back to {self.to_nimg / 1000:g} kimg "
            f"({self.reason})"
        )


def read_rollbacks(run: RunDirectory) -> list[Rollback]:
    """The rollbacks of a run so far, oldest first."""
    if not run.rollbacks.is_file():
        return []
    return [Rollback.model_validate(entry) for entry in json.loads(run.rollbacks.read_text(encoding="utf-8"))]


def discard_abandoned(run: RunDirectory) -> list[Rollback]:
    """Remove the checkpoints of stretches that rollbacks have abandoned; returns the rollbacks. By one worker.

    UserError if the storage fails.
    """
    with storage_errors(f"a rollback failed in {run.address(run.path)}"):
        rollbacks, depot = read_rollbacks(run), run.depot
        for name in depot.names() if rollbacks else []:
            marker = depot.marker(name)
            later = rollbacks[marker.get("rollbacks", 0) :] if marker else []
            if any(nimg_of(name) > rollback.to_nimg for rollback in later):
                depot.remove(name)
    return rollbacks


def roll_back(run: RunDirectory, mirror: Mirror | None, trouble: Diverged) -> Rollback:
    """Note a rollback down; by one worker. Resuming then does the rest. UserError if the storage fails."""
    with storage_errors(f"a rollback failed in {run.address(run.path)}"):
        run.check_owner()
        rollbacks = read_rollbacks(run)
        rollback = Rollback(
            number=len(rollbacks) + 1,
            from_nimg=trouble.nimg,
            to_nimg=best_before(complete_names(run.depot), trouble.notice.since, trouble.best_nimg),
            reason=trouble.notice.text,
        )
        entries = [entry.model_dump() for entry in (*rollbacks, rollback)]
        write_text(run.rollbacks, json.dumps(entries, indent=2) + "\n")
        if mirror:
            mirror.push()
    return rollback


def best_before(names: list[str], since: int, best_nimg: int | None) -> int:
    """Images of the checkpoint to go back to: of those from before the trouble began that of the best FID.

    `names`: complete checkpoints, newest first. If none is at the best FID, the nearest before it; without FID the
    newest; 0, the beginning, if there is none.
    """
    before = [name for name in names if nimg_of(name) < since]
    chosen = best_name(before, since if best_nimg is None else best_nimg)
    return 0 if chosen is None else nimg_of(chosen)


def refuse_to_go_on(config: Config, run: RunDirectory, trouble: Diverged) -> None:
    """TrainingStopped if the policy is to stop, or all rollbacks are used up."""
    guard = config.guard
    if guard.policy == "rollback" and trouble.rollbacks < guard.max_rollbacks:
        return
    if guard.policy == "rollback":
        why = f"guard.max_rollbacks {guard.max_rollbacks} are used up"
    else:
        why = "guard.policy is stop; --guard.policy rollback with the same command goes back to the best checkpoint"
    raise TrainingStopped(
        f"{trouble.notice.text}. Stopped at {trouble.nimg / 1000:g} kimg ({why}). The diverged weights were not saved; "
        f"earlier checkpoints and the best generator are in {run.address(run.path)}. {ADVICE}"
    )


def slowed(config: Config, rollbacks: int) -> Config:
    """The configuration with the learning rates that hold after this many rollbacks."""
    o, factor = config.optimizer, config.guard.rollback_lr_factor**rollbacks
    rates = {"generator_lr": o.generator_lr * factor, "fake_score_lr": o.fake_score_lr * factor}
    return config.model_copy(update={"optimizer": o.model_copy(update=rates)})
