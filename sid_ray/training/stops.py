"""When to ask for a stop: every few seconds, at iterations on which all ranks agree."""

from __future__ import annotations

import time

import torch

from sid_ray.training.distributed import World
from sid_ray.training.outside import Outside

CHECK_SECONDS = 5.0
"""About how often the workers ask; short against the 30 to 120 seconds that a preempted machine is given."""
LARGEST_STRETCH = 10
"""The interval grows by at most this factor from one check to the next: one quick iteration proves little."""


class StopChecks:
    """Asks the outside about every CHECK_SECONDS whether to stop.

    All ranks must ask in the same iteration, because the answer is agreed in a collective; their clocks differ, and
    a collective per step is what this avoids. So the interval is a number of iterations, and each check sets the
    next one's from the time that all ranks together took since the last: the same sum, the same interval.
    """

    def __init__(self, world: World, outside: Outside, seconds: float = CHECK_SECONDS):
        self.world, self.outside, self.seconds = world, outside, seconds
        self.interval = self.left = 1
        self._since = time.monotonic()

    def stop(self) -> bool:
        """Called once per iteration, on every rank: whether any of them is to stop. Mostly free."""
        self.left -= 1
        if self.left:
            return False
        mine = [float(self.outside.should_stop()), time.monotonic() - self._since]
        asked, elapsed = self.world.sum(torch.tensor(mine, device=self.world.device)).tolist()
        self.interval = next_interval(self.interval, elapsed / self.world.size, self.seconds)
        self.left, self._since = self.interval, time.monotonic()
        return asked > 0


def next_interval(interval: int, took: float, seconds: float) -> int:
    """How many iterations make up about `seconds`, if the last `interval` of them took `took` seconds."""
    return max(1, min(int(interval * seconds / max(took, 1e-6)), interval * LARGEST_STRETCH))
