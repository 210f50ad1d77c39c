"""Following a worker group from the driver: progress, losses, the wish to stop, and room for more workers."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sid_ray.errors import UserError
from sid_ray.launch.bulletin import News
from sid_ray.training.checkpoints import complete_names
from sid_ray.training.guard import TrainingStopped
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory

POLL_SECONDS = 0.2
WAITING_SECONDS = 60.0
"""After so long without workers the driver says that it waits."""


class DistillationFailed(Exception):
    """The workers failed; the message is for the user, the traceback lies in the run's error.log."""


class Viewer(Protocol):
    """Who is shown a run's progress: a terminal, or the sweep that the run belongs to."""

    def note(self, text: str) -> None:
        """Take a line of text."""
        ...

    def update(self, report: dict[str, Any]) -> None:
        """Take the figures of a report."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class Stop(Protocol):
    """Who may stop a run."""

    @property
    def asked(self) -> bool:
        """Whether the run is to stop; asked several times a second."""
        ...


class StopSignals:
    """While active, the first SIGINT or SIGTERM sets `asked`; a second one aborts."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.asked = say, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("stopping: the workers write a checkpoint and leave (again to abort)")


class Background:
    """A function in a thread of its own, which does not keep the process alive."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()

    def is_running(self, seconds: float) -> bool:
        """Whether it ran when this was asked; then waits at most so long for its end."""
        running = self._thread.is_alive()
        self._thread.join(seconds)
        return running

    def _run(self) -> None:
        try:
            self.function()
        except BaseException as error:
            self.error = error


class Growth:
    """Decides when a run on fewer workers than it may use should restart on more.

    Free resources must have been there for `patience` seconds. They may lie scattered, a part of a worker here and
    there; a restart that did not help doubles the patience.
    """

    def __init__(self, most: int, per_worker: dict[str, float], patience: float):
        self.most, self.per_worker, self.patience = most, per_worker, patience
        self.at_work, self.room_since, self.tried_at = 0, 0.0, 0

    def due(self, at_work: int, free: Callable[[], dict[str, float]], now: float) -> bool:
        """Whether to restart now; `free` gives the cluster's unused resources."""
        if at_work != self.at_work:
            if at_work:
                self.patience *= 2 if at_work == self.tried_at else 1
                self.tried_at = 0
            self.at_work, self.room_since = at_work, now
        if not 0 < at_work < self.most:
            return False
        unused = free()
        if any(unused.get(name, 0.0) < amount for name, amount in self.per_worker.items()):
            self.room_since = now
        if now - self.room_since < self.patience:
            return False
        self.tried_at, self.room_since = at_work, now
        return True


@dataclass
class Launch:
    """One launch of a worker group (which Ray may restart), and what came of it."""

    run: RunDirectory
    display: Viewer
    stop: Stop
    growth: Growth
    lost: list[str]
    """Gets a text when another process has taken over the run."""
    max_failures: int
    failures_before: int = 0
    """Failures of earlier launches by the same command."""
    failures: int = 0
    waiting_since: float = 0.0

    def follow(self, trainer: Any, bulletin: Any) -> tuple[Progress, str]:
        """Run `fit` in a thread until it ends; returns the counters, and why the workers left.

        `fit` on the main thread would take SIGINT for itself and abort the workers. Raises UserError,
        TrainingStopped or DistillationFailed for a run that ended without an outcome.
        """
        import ray

        fit = Background(trainer.fit)
        grows, last_loss, self.waiting_since = False, "", time.monotonic()
        while fit.is_running(POLL_SECONDS):
            news = ray.get(bulletin.exchange.remote(self.stop.asked or grows or bool(self.lost)))
            last_loss = news.losses[-1] if news.losses else last_loss
            self._tell(news)
            grows = grows or self.growth.due(news.at_work, ray.available_resources, time.monotonic())
            if self.stop.asked and not news.at_work:  # nobody has anything to save; who starts now leaves at once
                return self._saved(), "asked to"
        if self.lost:  # the workers have noticed it themselves
            raise DistillationFailed(
                f"{self.run.address(self.run.path)}: {self.lost[0]}; this process has stopped and written nothing more"
            )
        given_up, outcome, leaving = ray.get(bulletin.result.remote())
        if outcome is not None:
            return Progress.model_validate(outcome), leaving or ("there is room for more workers" if grows else "")
        if self.stop.asked and fit.error is None and given_up is None:
            return self._saved(), "asked to"
        raise self._failure(given_up, fit.error, last_loss)

    def _tell(self, news: News) -> None:
        for report in news.reports:
            self.display.note(report) if isinstance(report, str) else self.display.update(report)
        for who in news.losses:
            self.failures += 1
            count = self.failures_before + self.failures
            if count <= self.max_failures:
                newest = next(iter(complete_names(self.run.depot)), None)
                start = f"from {newest}" if newest else "from the beginning"
                self.display.note(f"{who}; restarting {start}, failure {count} of {self.max_failures}")
        now = time.monotonic()
        if news.joined:
            most = self.growth.most
            self.display.note(
                f"{news.at_work} worker(s) at work" + (f" of up to {most}" if news.at_work < most else "")
            )
        if news.at_work:
            self.waiting_since = now
        elif now - self.waiting_since > WAITING_SECONDS:
            self.waiting_since = now
            self.display.note("still waiting for workers: is there room for them in the cluster? (Ctrl-C leaves)")

    def _saved(self) -> Progress:
        depot = self.run.depot
        newest = next(iter(complete_names(depot)), None)
        return Progress() if newest is None else Progress.model_validate_json(depot.text(newest, "progress.json"))

    def _failure(self, given_up: tuple[str, str] | None, error: BaseException | None, last_loss: str) -> Exception:
        if given_up is not None:
            kind, message = given_up
            match kind:
                case "UserError":
                    return UserError(message)
                case "TrainingStopped":
                    return TrainingStopped(message)
            return DistillationFailed(message)
        message = last_loss or ("they ended without a result" if error is None else str(error))
        if error is not None and not last_loss:
            self.run.record_failure("the driver", "".join(traceback.format_exception(error)))
        count = self.failures_before + self.failures
        counted = f" (failure {count}, cluster.max_failures is {self.max_failures})" if count else ""
        details = f"The same command resumes. Details: {self.run.address(self.run.error_log)}"
        return DistillationFailed(f"the workers failed: {_headline(message)}{counted}\n{details}")


def _headline(message: str) -> str:
    """The first line of an error message, and the second where the first only announces it."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
