"""Where the time of an iteration goes: named stretches of the step, timed only while a stopwatch runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_running: ContextVar[Stopwatch | None] = ContextVar("running stopwatch", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A stretch of the step. Free of charge, and of waiting for the device, unless a `Stopwatch` runs."""
    stopwatch = _running.get()
    if stopwatch is None:
        yield
        return
    stopwatch.enter(name)
    try:
        yield
    finally:
        stopwatch.leave()


class Stopwatch:
    """Seconds by phase while it is entered. A phase within another is counted for itself alone.

    `wait`: waits for the device, else work that is only queued would be counted where it is waited for.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait
        self.seconds: dict[str, float] = {}
        self._names: list[str] = []
        self._since = 0.0

    def __enter__(self) -> Stopwatch:
        self._token = _running.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _running.reset(self._token)

    def enter(self, name: str) -> None:
        """Begin a phase."""
        self._lap()
        self._names.append(name)

    def leave(self) -> None:
        """End the phase that was begun last."""
        self._lap()
        self._names.pop()

    def _lap(self) -> None:
        """Credit the time since the last lap to the innermost phase."""
        self.wait()
        now = time.perf_counter()
        if self._names:
            name = self._names[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
