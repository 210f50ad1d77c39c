"""`board`: TensorBoard over a run, a sweep or a folder of them, local or on S3, while they are being written."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sid_ray.errors import UserError
from sid_ray.storage import cache_folder
from sid_ray.storage.following import follow
from sid_ray.storage.s3 import S3Folder, StorageError

RUNS = ("tensorboard", "*/tensorboard", "trials/*/tensorboard", "*/trials/*/tensorboard")
"""Where event files lie below a run, a folder of runs, a sweep, and a folder of sweeps."""
EVENTS = re.compile(r"([^/.][^/]*/)?(trials/[^/.][^/]*/)?tensorboard/([^/]+/)*events\.out\.tfevents\.[^/]+")
"""The same as names of objects on S3."""


def serve_board(where: str, host: str, port: int, every: float, note: Callable[[str], None] = print) -> int:
    """Serve until interrupted; returns TensorBoard's exit code. UserError if there is nothing to look at.

    `where`: a run, a sweep or a folder of them; its address on S3 is looked at again after `every` seconds, and so
    are new runs in either place.
    """
    source = _Source(where)
    source.refresh()
    with tempfile.TemporaryDirectory(prefix="sid-ray-board-") as view:
        runs = show(source.folder, source.name, Path(view))
        note(f"{', '.join(sorted(runs))}" if runs else f"there are no runs in {where} yet; they show as they come")
        server = subprocess.Popen(_command(Path(view), host, port, every))
        previous = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        try:
            return _keep_up(server, source, Path(view), every, note)
        except KeyboardInterrupt:
            return 0
        finally:
            signal.signal(signal.SIGTERM, previous)
            server.terminate()
            server.wait()


def find_runs(folder: Path, name: str) -> dict[str, Path]:
    """Folders of event files by what TensorBoard shall call them; `name` is that of the folder itself.

    `run`, `sweep/trial`; a single run goes by its own name.
    """
    runs = {}
    for pattern in RUNS:
        for tensorboard in folder.glob(pattern):
            parts = [part for part in tensorboard.parent.relative_to(folder).parts if part != "trials"]
            if tensorboard.is_dir() and not any(part.startswith(".") for part in parts):
                runs["/".join(parts) or name] = tensorboard
    return runs


def show(folder: Path, name: str, view: Path) -> dict[str, Path]:
    """Make links to the runs' event files in `view`, by their names, and remove those of runs that are gone."""
    runs = find_runs(folder, name)
    for link in [path for path in view.rglob("*") if path.is_symlink()]:
        if not link.exists():
            link.unlink()
    for run, events in runs.items():
        link = view / run
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(events.absolute(), target_is_directory=True)
    return runs


class _Source:
    """Where the runs are; those on S3 as a copy of their event files in this machine's cache."""

    def __init__(self, where: str):
        where = where.rstrip("/")
        self.where, self.name = where, where.rsplit("/", 1)[-1]
        self.remote = S3Folder(where) if where.startswith("s3://") else None
        if self.remote is not None:
            self.folder = cache_folder() / "board" / hashlib.sha256(where.encode()).hexdigest()[:16]
        else:
            self.folder = Path(where).expanduser().absolute()
            self.name = self.folder.name
            if not self.folder.is_dir():
                raise UserError(
                    f"RUN_OR_STORAGE: {where!r} is not a folder; allowed: a run, a folder of runs, s3://..."
                )

    def refresh(self) -> None:
        """Fetch what is new. UserError if S3 refuses."""
        if self.remote is None:
            return
        try:
            follow(self.folder, self.remote, lambda name: EVENTS.fullmatch(name) is not None)
        except StorageError as error:
            raise UserError(f"RUN_OR_STORAGE: {self.where!r} cannot be read: {error}") from error


def _command(view: Path, host: str, port: int, every: float) -> list[str]:
    address = ["--host", host, "--port", str(port)]
    reload = str(max(1, min(5, int(every))))
    return [sys.executable, "-m", "tensorboard.main", "--logdir", str(view), *address, "--reload_interval", reload]


def _keep_up(server: Any, source: _Source, view: Path, every: float, note: Callable[[str], None]) -> int:
    failing = False
    while True:
        try:
            return int(server.wait(timeout=every))
        except subprocess.TimeoutExpired:
            pass
        try:
            source.refresh()
            failing = False
        except UserError as error:
            if not failing:
                note(f"warning: {error}; it is tried again")
            failing = True
        show(source.folder, source.name, view)
