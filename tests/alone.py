"""A whole run in the test's own process: the only worker of its world, with what it tells recorded."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sid_ray.config import Config, load_config
from sid_ray.training.opening import claim, open_run
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory
from sid_ray.training.worker import run_worker


@dataclass
class Recorder:
    """An `Outside` that keeps what it is told. `at_report` is called with the image count of every report."""

    at_report: Callable[[int], None] = lambda nimg: None
    notes: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def report(self, metrics: dict[str, Any]) -> None:
        self.reports.append(metrics)
        self.at_report(metrics["nimg"])

    def note(self, text: str) -> None:
        self.notes.append(text)

    def should_stop(self) -> bool:
        return False

    @property
    def warnings(self) -> list[str]:
        return [note for note in self.notes if note.startswith("warning")]


def train(config: Config | str, outside: Recorder | None = None) -> tuple[RunDirectory, Progress]:
    """What `python -m sid_ray.training.worker` does, in this process."""
    config, outside = load_config(config) if isinstance(config, str) else config, outside or Recorder()
    with claim(config, outside.note, outside.notes.append) as lease:
        _, changed = open_run(config, lease.owner)
        outside.notes += [f"changed since: {text}" for text in changed]
        run = RunDirectory.of(config, lease.owner)
        return run, run_worker(config, run, outside)


@contextmanager
def largest_file(size: int):
    """Within, this process cannot write a file beyond `size` bytes: what a full disk or a quota does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
