"""SiD's power law: log FID falls about linearly in log images (arXiv 2404.04057, section 5), until it levels off.

So a trial's first evaluations tell how far it can get. A straight line is fitted robustly to (log nimg, log FID)
and extended to the budget. As real curves level off, the line is on the optimistic side: a trial whose optimistic
end cannot reach what another has reached already may stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Curve = Sequence[tuple[float, float]]
"""Evaluations of a run in order: (images, FID)."""


@dataclass(frozen=True)
class PowerLaw:
    """log FID = level + slope (log nimg - centre), with what the points leave open."""

    centre: float
    """Median of log nimg."""
    level: float
    """log FID there."""
    slope: float
    """Change of log FID per log image: negative while a run improves."""
    slope_low: float
    """The steepest fall that the points allow at the fit's confidence."""
    slope_high: float
    """The least fall that they allow."""
    scatter: float
    """Standard deviation of log FID about the line, from the median absolute deviation."""

    def forecast(self, nimg: float) -> Forecast:
        """FID at `nimg` images beyond the points, with an interval of slope and scatter together."""
        ahead = math.log(nimg) - self.centre
        low = self.level + self.slope_low * ahead - 2 * self.scatter
        high = self.level + self.slope_high * ahead + 2 * self.scatter
        return Forecast(math.exp(low), math.exp(self.level + self.slope * ahead), math.exp(high))


@dataclass(frozen=True)
class Forecast:
    """An FID to be expected."""

    low: float
    """The optimistic end."""
    middle: float
    high: float
    """The pessimistic end."""


def fit_power_law(curve: Curve, confidence: float = 0.95, fewest: int = 4, window: float = 8.0) -> PowerLaw | None:
    """The line through a curve's recent points; None if fewer than `fewest` of them can be used.

    Slope: Theil and Sen's median of all pairs' slopes with its confidence interval, which a spike does not move.
    Used are finite FIDs at most a factor `window` of images behind the last point, because the first few hundred
    images follow another law.
    """
    from scipy.stats import theilslopes

    usable = [(n, fid) for n, fid in curve if n > 0 and fid > 0 and math.isfinite(fid)]
    usable = [(n, fid) for n, fid in usable if n * window >= usable[-1][0]]
    if len(usable) < fewest:
        return None
    x, y = np.log(np.array(usable)).T
    slope, _, low, high = theilslopes(y, x, alpha=confidence)
    centre = float(np.median(x))
    residuals = y - slope * (x - centre)
    level = float(np.median(residuals))
    scatter = 1.4826 * float(np.median(np.abs(residuals - level)))
    return PowerLaw(centre, level, float(slope), float(low), float(high), scatter)


def cannot_reach(curve: Curve, budget: float, target: float, confidence: float = 0.95) -> bool:
    """Whether even the optimistic end of a curve's forecast at `budget` images stays above the FID `target`.

    False while there are too few points to say, and for a curve that has reached the target.
    """
    reached = min((fid for _, fid in curve if math.isfinite(fid)), default=math.inf)
    law = fit_power_law(curve, confidence)
    if law is None or reached <= target or not math.isfinite(target):
        return False
    return law.forecast(budget).low > target
