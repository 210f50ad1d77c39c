"""The small interface through which a worker's loop talks to whoever launched it."""

from __future__ import annotations

import signal
import threading
from typing import Any, Protocol


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


class PlainOutside:
    """A process of its own, or one of torchrun's: prints lines, stops on SIGINT and SIGTERM."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.stop = quiet, threading.Event()
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


def progress_line(m: dict[str, Any]) -> str:
    """One line of progress from a report."""
    parts = [f"{m['kimg']:8.1f} of {m['total_kimg']:g} kimg"]
    if m.get("images_per_second"):
        parts += [f"{m['images_per_second']:7.1f} images/s", f"ETA {duration(m['eta_seconds'])}"]
        parts += [f"loss fake {m['loss/fake_score']:8.3f}", f"gen {m['loss/generator']:8.3f}"]
    if m["skipped"]:
        parts.append(f"skipped {m['skipped']}")
    if m.get("fid") is not None:
        parts.append(f"FID {m['fid']:.3f} (best {m['best_fid']:.3f}" + _versus(m.get("teacher_fid")) + ")")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _versus(teacher_fid: float | None) -> str:
    return "" if teacher_fid is None else f", teacher {teacher_fid:.3f}"
