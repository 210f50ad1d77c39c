"""The bulletin: a small Ray actor through which workers tell the driver, and the driver asks them to stop."""

from __future__ import annotations

from typing import Any

import ray
import ray.train

from sid_ray.training.outside import Outside


class Bulletin:
    """Reports and notes in order, the first failure, the outcome, and whether to stop."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any] | str] = []
        self.failure: tuple[str, str] | None = None
        self.outcome: dict[str, Any] | None = None
        self.stopping = False

    def post(self, report: dict[str, Any] | str) -> None:
        """Add a report (figures) or a note (text)."""
        self.reports.append(report)

    def fail(self, kind: str, message: str) -> None:
        """Record a failure; the first one counts."""
        self.failure = self.failure or (kind, message)

    def end(self, outcome: dict[str, Any]) -> None:
        """Record how the run ended."""
        self.outcome = outcome

    def stop(self) -> None:
        """Ask the workers to stop at their next tick."""
        self.stopping = True

    def should_stop(self) -> bool:
        """Whether the driver asked to stop."""
        return self.stopping

    def read(self) -> list[dict[str, Any] | str]:
        """Take the reports and notes since the last call."""
        reports, self.reports = self.reports, []
        return reports

    def result(self) -> tuple[tuple[str, str] | None, dict[str, Any] | None]:
        """(failure, outcome)."""
        return self.failure, self.outcome


class RayOutside(Outside):
    """A worker's surroundings under Ray Train: metrics go to Ray and to the bulletin."""

    def __init__(self, bulletin: Any):
        self.bulletin = bulletin
        self.first = ray.train.get_context().get_world_rank() == 0

    def report(self, metrics: dict[str, Any]) -> None:
        """Report to the driver (first worker) and to Ray (all, collectively); metrics only, no checkpoint."""
        if self.first:
            ray.get(self.bulletin.post.remote(metrics))
        ray.train.report({k: v for k, v in metrics.items() if v is not None})

    def note(self, text: str) -> None:
        """Tell the driver's terminal."""
        ray.get(self.bulletin.post.remote(text))

    def should_stop(self) -> bool:
        """Whether the driver asked to stop."""
        return bool(ray.get(self.bulletin.should_stop.remote()))
