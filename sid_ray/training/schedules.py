"""What depends on the number of images alone: learning rates, the average's horizon, what is due."""

from __future__ import annotations

import math
from typing import Literal

from sid_ray.config import Config


def learning_rate(base: float, schedule: Literal["constant", "cosine"], nimg: int, total_nimg: int) -> float:
    """Learning rate of the step that starts at `nimg` images: constant, or a half cosine down to 0."""
    if schedule == "constant":
        return base
    return base * (1 + math.cos(math.pi * min(nimg / total_nimg, 1.0))) / 2


def learning_rates(config: Config, nimg: int) -> tuple[float, float]:
    """Learning rates of (generator, fake score) in the step that starts at `nimg` images."""
    o, total = config.optimizer, config.total_nimg
    fake_score = learning_rate(o.fake_score_lr, o.fake_score_schedule or o.schedule, nimg, total)
    return learning_rate(o.generator_lr, o.schedule, nimg, total), fake_score


def ema_beta(batch: int, nimg: int, halflife_kimg: float, rampup_ratio: float | None) -> float:
    """Share of the old average kept by a step: 0.5^(B / halflife), EDM's convention.

    `nimg` is counted before the step; with a ramp the half-life is at most `rampup_ratio` nimg, so the first
    step copies the generator.
    """
    halflife = halflife_kimg * 1000
    if rampup_ratio is not None:
        halflife = min(halflife, nimg * rampup_ratio)
    return 0.5 ** (batch / max(halflife, 1e-8))


def crossed(every_kimg: float, before: int, after: int) -> bool:
    """Whether a multiple of the interval lies in (before, after], both counted in images."""
    interval = every_kimg * 1000
    return math.floor(after / interval + 1e-9) > math.floor(before / interval + 1e-9)


def evaluation_due(every_kimg: float, before: int, after: int) -> bool:
    """Like `crossed`, and also at 1/8, 1/4 and 1/2 of the first interval."""
    early = (every_kimg * 1000 * share for share in (1 / 8, 1 / 4, 1 / 2))
    return crossed(every_kimg, before, after) or any(before < point <= after for point in early)
