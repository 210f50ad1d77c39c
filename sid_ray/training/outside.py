"""The small interface through which a worker's loop talks to whoever launched it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any, Protocol

Job = Callable[[], float]
"""Picklable, and imports what it needs."""


class Outside(Protocol):
    """What the loop asks of its surroundings; Ray, torchrun or a plain process provide it."""

    def report(self, metrics: dict[str, Any]) -> None:
        """Take the latest figures; called on every rank, about once a tick."""
        ...

    def note(self, text: str) -> None:
        """Tell a person something beside the figures; called on the first worker only."""
        ...

    def should_stop(self) -> bool:
        """Whether to write a checkpoint and leave; asked on every rank at once, every few seconds."""
        ...

    def begin(self, name: str, job: Job) -> None:
        """Start a job beside the training, in a process that has other resources; called on the first worker only."""
        ...

    def results(self) -> dict[str, float | None]:
        """What has come of jobs since this was last asked, by name; None for one that failed. First worker only."""
        ...

    def forget(self) -> None:
        """Give up the jobs that are under way; nothing of them will be asked. First worker only."""
        ...


class PlainOutside:
    """A process of its own, or one of torchrun's: prints lines, stops on SIGINT and SIGTERM.

    A job beside the training runs in one more process on this machine.
    """

    def __init__(self, quiet: bool = False):
        self.quiet, self.stop = quiet, threading.Event()
        self.jobs: dict[str, Future[float]] = {}
        self.beside: ProcessPoolExecutor | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: self.stop.set())

    def report(self, metrics: dict[str, Any]) -> None:
        """Print one line of honest progress."""
        if not self.quiet:
            print(progress_line(metrics), flush=True)

    def note(self, text: str) -> None:
        """Print it."""
        if not self.quiet:
            print(text, flush=True)

    def should_stop(self) -> bool:
        """Whether a signal came."""
        return self.stop.is_set()

    def begin(self, name: str, job: Job) -> None:
        """Queue it for the process beside this one."""
        if self.beside is None:
            self.beside = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self.jobs[name] = self.beside.submit(job)
        except BrokenExecutor as error:  # it was ended from outside, and with it all that was queued
            self.jobs[name] = Future()
            self.jobs[name].set_exception(error)

    def results(self) -> dict[str, float | None]:
        """Of the jobs that are done."""
        done = {name: future for name, future in self.jobs.items() if future.done()}
        for name, future in done.items():
            del self.jobs[name]
            if (error := future.exception()) is not None:
                self.note(f"warning: a job beside the training failed: {error}")
        return {name: None if future.exception() else future.result() for name, future in done.items()}

    def forget(self) -> None:
        """Cancel what has not begun; what has begun ends for nothing, and the process with it."""
        self.jobs.clear()
        if self.beside is not None:
            self.beside.shutdown(wait=False, cancel_futures=True)
            self.beside = None


def progress_line(m: dict[str, Any]) -> str:
    """One line of progress from a report."""
    parts = [f"{m['kimg']:8.1f} of {m['total_kimg']:g} kimg"]
    if m.get("images_per_second"):
        parts += [f"{m['images_per_second']:7.1f} images/s", f"ETA {duration(m['eta_seconds'])}"]
        parts += [f"loss fake {m['loss/fake_score']:8.3f}", f"gen {m['loss/generator']:8.3f}"]
    if m["skipped"]:
        parts.append(f"skipped {m['skipped']}")
    if m.get("fid") is not None:
        best = m["fid"] if m["best_fid"] is None else m["best_fid"]
        parts.append(f"FID {m['fid']:.3f} (best {best:.3f}" + _versus(m.get("teacher_fid")) + ")")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _versus(teacher_fid: float | None) -> str:
    return "" if teacher_fid is None else f", teacher {teacher_fid:.3f}"
