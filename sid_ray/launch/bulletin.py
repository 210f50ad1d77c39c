"""The bulletin: a small Ray actor through which workers tell the driver, and the driver asks them to stop.

One per launch of a worker group; it lives beside the driver, so that no lost worker takes it along. Ray may restart
the group meanwhile (lost workers): whatever failed before, the outcome counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class News:
    """What has happened since the driver last asked."""

    at_work: int
    """Size of the worker group that is running; 0 while there is none."""
    reports: list[dict[str, Any] | str] = field(default_factory=list)
    """Figures and notes, in order."""
    losses: list[str] = field(default_factory=list)
    """Each time workers were lost: who, and why."""
    joined: bool = False
    """Whether a group has started to work."""


class Bulletin:
    """Reports in order, losses, whether to stop, and how it ended."""

    def __init__(self) -> None:
        self.news = News(at_work=0)
        self.stopping = self.lost = False
        self.given_up: dict[int, tuple[str, str]] = {}
        self.leaving: str | None = None
        self.outcome: dict[str, Any] | None = None

    def join(self, rank: int, size: int) -> bool:
        """A worker has started; returns whether there is anything to do."""
        if self.stopping or self.given_up:
            return False
        self.lost = False
        if rank == 0:
            self.news.at_work, self.news.joined = size, True
        return True

    def post(self, report: dict[str, Any] | str) -> None:
        """Add a report (figures) or a note (text)."""
        self.news.reports.append(report)

    def lose(self, who: str) -> None:
        """Workers were lost; Ray restarts the group, or ends the run. It may say so more than once of a group."""
        if not self.lost:
            self.news.losses.append(who)
        self.lost, self.news.at_work = True, 0

    def give_up(self, rank: int, kind: str, message: str) -> int:
        """A worker has met what no restart can mend; returns how many have."""
        self.given_up[rank] = kind, message
        return len(self.given_up)

    def leave(self, reason: str) -> None:
        """A worker knows why the group is to leave."""
        self.leaving = self.leaving or reason

    def end(self, outcome: dict[str, Any]) -> None:
        """Record how the run ended."""
        self.outcome = outcome

    def should_stop(self) -> bool:
        """Whether the driver asked to stop."""
        return self.stopping

    def exchange(self, stop: bool) -> News:
        """The driver's call: it may ask the workers to stop, and takes the news."""
        self.stopping = self.stopping or stop
        news, self.news = self.news, News(at_work=self.news.at_work)
        return news

    def result(self) -> tuple[tuple[str, str] | None, dict[str, Any] | None, str | None]:
        """((kind, message) of what no restart can mend, outcome, why the workers left)."""
        return next(iter(self.given_up.values()), None), self.outcome, self.leaving
