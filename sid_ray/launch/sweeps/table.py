"""What the terminal shows of a sweep: a live table of its trials, or plain lines where it is no terminal."""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sid_ray.launch.sweeps.journal import Journal, State, TrialRecord
from sid_ray.launch.sweeps.search import units
from sid_ray.launch.sweeps.space import Space

COLOURS: dict[State, str] = {
    "running": "cyan",
    "finished": "green",
    "diverged": "red",
    "behind": "yellow",
    "failed": "magenta",
}
ORDER: tuple[State, ...] = ("running", "finished", "behind", "diverged", "failed")
CHROME = 6
"""Lines of a terminal that are not rows of the table."""


class SweepDisplay:
    """Shows each record as it changes; `quiet` shows nothing."""

    def __init__(self, space: Space, quiet: bool = False):
        self.space, self.quiet = space, quiet
        self.records: dict[str, TrialRecord] = {}
        self.shown: set[str] = set()
        self.live: Live | None = None
        self._lock = threading.Lock()

    def begin(self, journal: Journal, address: str) -> None:
        """Show where the sweep stands before it goes on."""
        self.records = dict(journal.records)
        self.note(f"{'resuming' if self.records else 'new'} sweep in {address}: {self._standing()}")
        if sys.stdout.isatty() and not self.quiet:
            self.live = Live(self._table(), console=Console(highlight=False), auto_refresh=False)
            self.live.start()

    def note(self, text: str) -> None:
        """Say something beside the table."""
        if self.live:
            self.live.console.print(text, markup=False)
        elif not self.quiet:
            print(text, flush=True)

    def show(self, record: TrialRecord) -> None:
        """A record has changed."""
        with self._lock:
            before = self.records.get(record.name) if record.name in self.shown else None
            self.records[record.name] = record
            self.shown.add(record.name)
        if self.live or self.quiet:
            return
        if before is None or before.state != record.state:
            print(f"{_event(record)}  [{self._standing()}]", flush=True)
        elif record.curve != before.curve:
            print(_progress(record, self.space.budget_kimg), flush=True)

    def refresh(self) -> None:
        """Draw the table anew."""
        if self.live:
            self.live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leave the last table on the terminal."""
        if self.live:
            self.refresh()
            self.live.stop()
            self.live = None

    def _standing(self) -> str:
        with self._lock:
            records = list(self.records.values())
        total, ended = len(units(self.space)), sum(r.ended for r in records)
        best = min(records, key=lambda r: r.best_fid, default=None)
        leader = f", best FID {best.best_fid:.3f} ({best.name})" if best and math.isfinite(best.best_fid) else ""
        return f"{ended} of {total} runs ended{leader}"

    def _table(self) -> Table:
        with self._lock:
            records = sorted(self.records.values(), key=lambda r: (ORDER.index(r.state), r.best_fid))
        table = trial_table(self.space, records)
        counts = Counter(r.state for r in records)
        table.caption = self._standing() + "".join(f", {counts[s]} {s}" for s in ORDER if counts[s])
        if self.live:
            room = max(3, self.live.console.height - CHROME)
            if len(records) > room:
                table = trial_table(self.space, records[:room])
                table.caption = f"{self._standing()}; {len(records) - room} more are not shown"
        return table


def trial_table(space: Space, records: list[TrialRecord]) -> Table:
    """A row per run: state, images, FID, best, and the searched fields."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in ("run", "state", "kimg", "FID", "best", *(field.rpartition(".")[2] for field in space.fields)):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
    for r in records:
        state = Text(r.state, style=COLOURS[r.state])
        values = [short(r.values.get(field)) for field in space.fields]
        table.add_row(r.name, state, f"{r.nimg / 1000:.1f}", short(r.last_fid), short(r.best_fid), *values)
    return table


def short(value: Any) -> str:
    """A value in a table: numbers to three digits, or what is not finite as such."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if not math.isfinite(value):
        return "-" if math.isinf(value) else "nan"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _event(r: TrialRecord) -> str:
    if r.state == "running":
        fields = "  ".join(f"{field.rpartition('.')[2]} {short(value)}" for field, value in r.values.items())
        return f"{r.name}  {'goes on' if r.curve else 'starts'}: {fields}"
    reason = f": {r.reason}" if r.reason else ""
    return f"{r.name}  {r.state} at {r.nimg / 1000:g} kimg, best FID {short(r.best_fid)}{reason}"


def _progress(r: TrialRecord, budget_kimg: float) -> str:
    return f"{r.name}  {r.nimg / 1000:8.1f} of {budget_kimg:g} kimg  FID {short(r.last_fid)} (best {short(r.best_fid)})"


def print_outcome(path: str, records: list[TrialRecord], best: str | None, finished: bool) -> None:
    """How the sweep stands, where its report is, and what to try next."""
    counts = Counter(r.state for r in records)
    print(", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state]) or "nothing has run")
    for record in records:
        if record.state == "failed":
            print(f"{record.name} failed: {record.reason}")
    if best is None:
        print(f"no run has an FID; the runs are in {path}/trials")
        return
    following = [
        f"sid-ray distill {best}",
        f"sid-ray generate {path}/best --out grid.png",
        f"sid-ray board {path}",
    ]
    if not finished:
        following.insert(0, "the same command again   (goes on)")
    print(f"report in {path}/report.md\nNext:\n  " + "\n  ".join(following))
