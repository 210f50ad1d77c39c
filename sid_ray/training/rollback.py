"""Going back after a divergence, without changing any state in place: note it down, leave, resume.

`<run>/rollbacks.json` lists the rollbacks of a run. Adding one, which happens in one step, is the whole act:
checkpoints of the stretch that it abandons no longer count, whoever resumes and whenever; their number is part
of every seed and lowers the learning rates. So a worker that dies in between loses nothing.
"""

from __future__ import annotations

import json
import shutil

from pydantic import BaseModel, ConfigDict

from sid_ray.config import Config
from sid_ray.teachers.model_directory import write_text
from sid_ray.training.checkpoints import MARKER, complete_checkpoints, read_progress
from sid_ray.training.guard import Diverged, TrainingStopped
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory

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


def discard_abandoned(run: RunDirectory) -> None:
    """Delete the checkpoints of stretches that rollbacks have abandoned; by one worker."""
    rollbacks = read_rollbacks(run)
    for checkpoint in complete_checkpoints(run.checkpoints) if rollbacks else []:
        progress = read_progress(checkpoint)
        if any(progress.nimg > later.to_nimg for later in rollbacks[progress.rollbacks :]):
            (checkpoint / MARKER).unlink()  # first, so that one half deleted is not complete
            shutil.rmtree(checkpoint)


def roll_back(run: RunDirectory, trouble: Diverged) -> Rollback:
    """Note a rollback down; by one worker. Resuming then does the rest."""
    rollbacks = read_rollbacks(run)
    earlier = [read_progress(path) for path in complete_checkpoints(run.checkpoints)]
    rollback = Rollback(
        number=len(rollbacks) + 1,
        from_nimg=trouble.nimg,
        to_nimg=best_before(earlier, trouble.notice.since),
        reason=trouble.notice.text,
    )
    entries = [entry.model_dump() for entry in (*rollbacks, rollback)]
    write_text(run.rollbacks, json.dumps(entries, indent=2) + "\n")
    return rollback


def best_before(checkpoints: list[Progress], since: int) -> int:
    """Images of the checkpoint to go back to, among those from before the trouble began; 0 if there is none.

    The one of the lowest FID, and of several with the same measurement the nearest to it, the oldest. Without
    any FID the newest.
    """
    before = [p for p in checkpoints if p.nimg < since]
    measured = [(p.fid, p.nimg) for p in before if p.fid is not None]
    return min(measured)[1] if measured else max((p.nimg for p in before), default=0)


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
        f"earlier checkpoints and the best generator are in {run.path}. {ADVICE}"
    )


def slowed(config: Config, rollbacks: int) -> Config:
    """The configuration with the learning rates that hold after this many rollbacks."""
    o, factor = config.optimizer, config.guard.rollback_lr_factor**rollbacks
    rates = {"generator_lr": o.generator_lr * factor, "fake_score_lr": o.fake_score_lr * factor}
    return config.model_copy(update={"optimizer": o.model_copy(update=rates)})
