"""Which trials a sweep runs: a fixed list (grid, random), or one that learns from the trials before (TPE)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from sid_ray.launch.sweeps.journal import Journal, TrialRecord
from sid_ray.launch.sweeps.space import Range, Space, Values


class Unit(NamedTuple):
    """One run to make: a trial with one of its seeds."""

    name: str
    number: int
    repeat: int


def units(space: Space) -> list[Unit]:
    """All runs of a sweep in order: every trial once, then every trial with its next seed, ..."""
    numbers = range(len(space.grid()) if space.search == "grid" else space.trials)
    return [Unit(_name(n, r, space.repeats), n, r) for r in range(space.repeats) for n in numbers]


def _name(number: int, repeat: int, repeats: int) -> str:
    return f"t{number:03d}" if repeats == 1 else f"t{number:03d}-s{repeat}"


@dataclass
class Proposals:
    """The values of each trial; what the journal has recorded stands, so a repeated command runs the same trials."""

    space: Space
    journal: Journal

    def values(self, number: int) -> Values:
        """The values of a trial; for TPE they depend on the trials that have ended by now."""
        begun = self.journal.of_number(number)
        if begun:
            return begun[0].values
        if number == 0 and self.space.has_preset_first:
            return self.space.of_preset()
        match self.space.search:
            case "grid":
                return self.grid[number]
            case "random":
                return self.space.draw(number)
            case "tpe":
                return self.space.complete(suggest(self.space, list(self.journal.records.values()), number))

    @cached_property
    def grid(self) -> list[Values]:
        """Every combination."""
        return self.space.grid()


def suggest(space: Space, records: list[TrialRecord], number: int) -> Values:
    """The searched values that Optuna's TPE suggests next, given what is known: a function of these arguments."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(r) for name, r in space.searched.items()}
    sampler = optuna.samplers.TPESampler(seed=space.seed * 100_003 + number, n_startup_trials=max(5, space.trials // 4))
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for values, score in outcomes(records):
        searched = {name: values[name] for name in distributions}
        if not all(space.fields[name].contains(value) for name, value in searched.items()):
            continue  # the preset's own values may lie outside the ranges
        study.add_trial(optuna.trial.create_trial(params=searched, distributions=distributions, value=score))
    return dict(study.ask(distributions).params)


def outcomes(records: list[TrialRecord]) -> Iterator[tuple[Values, float]]:
    """(values, score) of every trial with a run that has ended; a diverged run scores inf, others log best FID."""
    for number in sorted({record.number for record in records}):
        runs = [record for record in records if record.number == number]
        scores = [math.inf if run.state == "diverged" else math.log(run.best_fid) for run in runs if run.ended]
        if scores:
            yield runs[0].values, statistics.fmean(scores)


def _distribution(range_: Range) -> Any:
    """A range as Optuna's."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if range_.uniform:
        return FloatDistribution(*range_.uniform)
    if range_.loguniform:
        return FloatDistribution(*range_.loguniform, log=True)
    if range_.quantised:
        low, high, step = range_.quantised
        return FloatDistribution(low, high, step=step)
    return CategoricalDistribution(range_.choice or ())
