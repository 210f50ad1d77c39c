"""The guard: what counts as divergence. One definition, for the training loop and for the trials of a sweep.

Two rules, both blind to the unit of what they judge:

- FID, the measure of progress: not finite, or above `guard.fid_factor` times the best so far in
  `guard.fid_patience` evaluations in a row. Fewer in a row are a spike, which is told and forgiven.
- Magnitude of the fake score's loss and of both gradient norms: one of them above `guard.explosion_factor` times its
  median over recent ticks, in `guard.explosion_patience` ticks in a row. The generator's loss is not judged: its terms
  cancel, so that it changes sign, and grows a hundredfold in runs whose FID falls. What blows it up blows up its
  gradient.

Pure functions over what has been observed, without torch or Ray. What a rule remembers is a small value that
travels in the checkpoint, so a resumed run judges as the uninterrupted one would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from sid_ray.config import Guard as Rules

WINDOW = 20
"""Ticks whose median is the level that magnitudes are compared with."""
WARM_UP = 10
"""Ticks before magnitudes are judged: they grow while the fake score leaves the teacher, where it starts."""
MAGNITUDES = ("loss/fake_score", "gradient_norm/fake_score", "gradient_norm/generator")
"""The scalars that are judged by their magnitude."""

Event = Literal["spike", "divergence", "recovery"]
"""The first observation that is too high; one too many of them; the first normal one afterwards."""


class TrainingStopped(Exception):
    """Training ended early, and starting it again would not help; the message says why and what to try."""


class Diverged(Exception):
    """Leave: the run has diverged, and the policy is not to go on. The same on every worker."""

    def __init__(self, notice: Notice, nimg: int, rollbacks: int, best_nimg: int | None):
        """`nimg`: images so far; `rollbacks`: how many before; `best_nimg`: where the best FID is; None without FID."""
        super().__init__(notice.text)
        self.notice, self.nimg, self.rollbacks, self.best_nimg = notice, nimg, rollbacks, best_nimg


@dataclass(frozen=True)
class Notice:
    """Something the guard noticed."""

    event: Event
    text: str
    """For a person, in one line."""
    since: int
    """Images at which it began."""


class Remembered(BaseModel):
    """What a rule remembers: immutable, and part of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Streak(Remembered):
    """Observations in a row that were too high."""

    length: int = 0
    """How many; 0 is normal."""
    since: int = 0
    """Images at the first of them."""

    def follow(self, nimg: int, weight: int, patience: int) -> tuple[Streak, Event | None]:
        """The streak after another observation, and what that means.

        `weight`: 0 for a normal observation, 1 for one that is too high, `patience` for one beyond doubt.
        """
        if weight == 0:
            return Streak(), "recovery" if self.length else None
        after = Streak(length=self.length + weight, since=self.since if self.length else nimg)
        if after.length >= patience:
            return after, "divergence"
        return after, None if self.length else "spike"


class FidHistory(Remembered):
    """What the rule on FID remembers."""

    best: float | None = None
    """The lowest finite FID so far."""
    streak: Streak = Streak()

    def ratio(self, fid: float) -> float | None:
        """A finite FID in units of the best before it; None if there is none."""
        return fid / self.best if self.best and math.isfinite(fid) else None


class TickHistory(Remembered):
    """What the rule on magnitudes remembers."""

    recent: dict[str, tuple[float, ...]] = {}
    """Each magnitude in the last normal ticks, oldest first."""
    streak: Streak = Streak()

    def ratio(self, name: str, value: float) -> float | None:
        """A magnitude in units of its median over recent ticks; None while there are too few, or if that is 0.

        None too for a value that is not finite: it comes from a skipped step, which is counted elsewhere.
        """
        recent = self.recent.get(name, ())
        level = statistics.median(recent) if len(recent) >= WARM_UP else 0.0
        return abs(value) / level if level and math.isfinite(value) else None


class GuardState(Remembered):
    """All that the guard remembers of a run."""

    fid: FidHistory = FidHistory()
    ticks: TickHistory = TickHistory()
    recovered: int = 0
    """How often something that was too high became normal again."""


def judge_fid(history: FidHistory, nimg: int, fid: float, rules: Rules) -> tuple[FidHistory, Event | None]:
    """One step of the rule on FID: the history after an evaluation, and what the evaluation means."""
    if not math.isfinite(fid):
        streak, event = history.streak.follow(nimg, rules.fid_patience, rules.fid_patience)
        return FidHistory(best=history.best, streak=streak), event
    ratio = history.ratio(fid)
    streak, event = history.streak.follow(nimg, int(ratio is not None and ratio > rules.fid_factor), rules.fid_patience)
    return FidHistory(best=fid if history.best is None else min(fid, history.best), streak=streak), event


def judge_fids(points: Iterable[tuple[int, float]], rules: Rules) -> list[tuple[int, Event]]:
    """The events of a whole FID curve, given as (images, FID) in order."""
    history, events = FidHistory(), list[tuple[int, Event]]()
    for nimg, fid in points:
        history, event = judge_fid(history, nimg, fid, rules)
        if event:
            events.append((nimg, event))
    return events


def judge_tick(
    history: TickHistory, nimg: int, values: Mapping[str, float], rules: Rules
) -> tuple[TickHistory, Event | None]:
    """One step of the rule on magnitudes: the history after a tick, and what the tick means.

    A tick is too high if one of its values is. After a divergence the levels are learned anew, so that a run that
    goes on is warned once.
    """
    ratios = [history.ratio(name, value) for name, value in values.items()]
    high = any(ratio is not None and ratio > rules.explosion_factor for ratio in ratios)
    streak, event = history.streak.follow(nimg, int(high), rules.explosion_patience)
    if event == "divergence":
        return TickHistory(), event
    recent = history.recent
    if not high:
        finite = {name: (abs(value),) if math.isfinite(value) else () for name, value in values.items()}
        recent = recent | {name: (*recent.get(name, ()), *new)[-WINDOW:] for name, new in finite.items()}
    return TickHistory(recent=recent, streak=streak), event


class Watched(NamedTuple):
    """The outcome of `watch`."""

    state: GuardState
    notices: list[Notice]
    scalars: dict[str, float]
    """What the rules compared, for the board."""


def watch(state: GuardState, nimg: int, metrics: Mapping[str, float], fid: float | None, rules: Rules) -> Watched:
    """Judge a tick's magnitudes, and the FID if it has just been measured (else None)."""
    notices, scalars, fid_history = list[Notice](), dict[str, float](), state.fid
    if fid is not None:
        fid_history, event = judge_fid(state.fid, nimg, fid, rules)
        ratio = state.fid.ratio(fid)
        figure = f"FID {fid:.4g}" + ("" if ratio is None else f", {ratio:.3g} times the best")
        notices += _notices(event, figure, state.fid.streak, nimg)
        scalars |= {} if ratio is None else {"guard/fid_ratio": ratio}
    values = {name: metrics[name] for name in MAGNITUDES if name in metrics}
    tick_history, event = judge_tick(state.ticks, nimg, values, rules)
    ratios = {name: ratio for name, value in values.items() if (ratio := state.ticks.ratio(name, value)) is not None}
    if ratios:
        worst = max(ratios, key=lambda name: ratios[name])
        figure = f"{worst} {values[worst]:.4g}, {ratios[worst]:.3g} times its recent level"
        notices += _notices(event, figure, state.ticks.streak, nimg)
        scalars["guard/magnitude_ratio"] = ratios[worst]
    recovered = state.recovered + sum(n.event == "recovery" for n in notices)
    after = GuardState(fid=fid_history, ticks=tick_history, recovered=recovered)
    return Watched(after, notices, scalars | {"guard/recovered": float(recovered)})


def watch_skips(skipped_in_a_row: int, nimg: int, batch: int, rules: Rules) -> list[Notice]:
    """Judge an iteration: a notice at each `guard.max_skipped_in_a_row` iterations in a row with a skipped step."""
    if skipped_in_a_row == 0 or skipped_in_a_row % rules.max_skipped_in_a_row:
        return []
    text = f"divergence: gradients were not finite in {skipped_in_a_row} iterations in a row"
    return [Notice("divergence", text, nimg - skipped_in_a_row * batch)]


def _notices(event: Event | None, figure: str, before: Streak, nimg: int) -> list[Notice]:
    if event is None:
        return []
    since = before.since if before.length else nimg
    duration = "" if event == "spike" else f", {'after trouble ' * (event == 'recovery')}since {since / 1000:g} kimg"
    return [Notice(event, f"{event}: {figure}{duration}", since)]
