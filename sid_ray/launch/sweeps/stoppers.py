"""When a trial is given up: stoppers for Ray Tune that can be used alone.

They read `nimg` and `fid` of each report. FID that is not finite, which Tune's own schedulers never stop, is a
divergence here; what counts as one is defined once, in `training.guard`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from ray.tune import Stopper

from sid_ray.config import Guard
from sid_ray.launch.sweeps.power_law import cannot_reach
from sid_ray.training.guard import FidHistory, judge_fid


class DivergenceStopper(Stopper):
    """Stops a trial whose FID diverges by the guard's rule: a spike that recovers does not count."""

    def __init__(self, rules: Guard | None = None):
        self.rules = rules or Guard()
        self.histories: dict[str, FidHistory] = defaultdict(FidHistory)
        self.seen: dict[str, int] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial's FID has diverged; a report without a new evaluation changes nothing."""
        nimg, fid = int(result["nimg"]), result["fid"]
        if fid is None or self.seen.get(trial_id) == nimg:
            return False
        self.seen[trial_id] = nimg
        self.histories[trial_id], event = judge_fid(self.histories[trial_id], nimg, float(fid), self.rules)
        return event == "divergence"

    def stop_all(self) -> bool:
        """Never."""
        return False


class PowerLawStopper(Stopper):
    """Stops a trial whose extrapolated FID cannot reach what another trial has reached.

    `budget`: images of a whole trial. `grace`: images before which nothing is stopped. `best`: FID reached by
    trials that ended before this process.
    """

    def __init__(self, budget: float, grace: float, best: float = math.inf, confidence: float = 0.95):
        self.budget, self.grace, self.confidence = budget, grace, confidence
        self.earlier = best
        self.curves: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial is hopeless."""
        nimg, fid = float(result["nimg"]), result["fid"]
        curve = self.curves[trial_id]
        if fid is None or (curve and curve[-1][0] == nimg):
            return False
        curve.append((nimg, float(fid)))
        return nimg >= self.grace and cannot_reach(curve, self.budget, self.target(trial_id), self.confidence)

    def target(self, trial_id: str) -> float:
        """The lowest FID that another trial has reached."""
        others = [fid for name, curve in self.curves.items() if name != trial_id for _, fid in curve]
        return min([self.earlier, *(fid for fid in others if math.isfinite(fid))])

    def stop_all(self) -> bool:
        """Never."""
        return False
