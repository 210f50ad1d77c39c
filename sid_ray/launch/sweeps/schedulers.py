"""Ray Tune's schedulers, whose decision to stop a trial is passed on instead of carried out (see `Follower`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler


class Gentle(TrialScheduler):
    """Mixed into a scheduler: `give_up` gets the name of each trial that it would stop, once."""

    def __init__(self, give_up: Callable[[str], None], **settings: Any):
        super().__init__(**settings)
        self.give_up, self.given_up = give_up, set[str]()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Judge an evaluation; a trial goes on until it leaves by itself."""
        name = trial.config["name"]
        if name in self.given_up:
            return str(TrialScheduler.CONTINUE)
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.given_up.add(name)
            self.give_up(name)
            return str(TrialScheduler.CONTINUE)
        return str(decision)


class GentleAsha(Gentle, AsyncHyperBandScheduler):
    """Asynchronous successive halving."""


class GentleMedian(Gentle, MedianStoppingRule):
    """The median stopping rule."""
