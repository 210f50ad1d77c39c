"""A folder on this machine and its likeness on S3: pulled before work begins, pushed while it goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from sid_ray.storage.lease import Taken
from sid_ray.storage.s3 import S3Folder

POLL_SECONDS = 5.0
"""How often the pushing thread looks for files that have changed."""
LAST_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds between the attempts to push what is left at the end."""
RECORD = ".pulled.json"
Stamp = tuple[int, int]
"""Size and time of change in nanoseconds: what tells that a file has changed."""


def pull(folder: Path, remote: S3Folder, skip: tuple[str, ...]) -> None:
    """Make a local folder like the remote one, once for all processes of this machine; StorageError if it fails.

    Top-level names in `skip`, and those that begin with a dot, are left alone on both sides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".pull.lock"):
        record = folder / RECORD
        before = json.loads(record.read_text()) if record.is_file() else {}
        there = {n: o.etag for n, o in remote.objects().items() if _is_mirrored(n, skip)}
        here = _stamps(folder, skip)
        for name in here.keys() - there.keys():
            (folder / name).unlink()
        after = {}
        for name, etag in there.items():
            if name not in here or before.get(name) != [etag, *here[name]]:
                remote.download(name, folder / name)
            after[name] = [etag, *_stamp(folder / name)]
        record.write_text(json.dumps(after))


class Mirror:
    """Pushes what changes in a folder, in a thread of its own. The latest content wins; a failure is tried again.

    Files appear on S3 in the order of their names within a folder, `config.json` last: it makes a model directory
    whole. `may_write` is called before anything is pushed, and raises if it may not be.
    """

    def __init__(
        self,
        folder: Path,
        remote: S3Folder,
        skip: tuple[str, ...],
        note: Callable[[str], None],
        may_write: Callable[[], None] = lambda: None,
    ):
        self.folder, self.remote, self.skip, self.note, self.may_write = folder, remote, skip, note, may_write
        self.pushed = _stamps(folder, skip)
        self.failing = False
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def flush(self) -> bool:
        """Push all that has changed now; returns whether it arrived. Warned about once while it fails."""
        try:
            self.push()
        except OSError as error:
            if not self.failing:
                self.note(f"warning: {error}; it is tried again while training goes on")
            self.failing = True
            return False
        self.failing = False
        return True

    def close(self) -> None:
        """Push the rest and end the thread. StorageError if it did not arrive after some minutes."""
        self._end.set()
        self._thread.join()
        for pause in LAST_PAUSES:
            if self.flush():
                return
            time.sleep(pause)
        self.push()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close; after a failure push once, so that the failure is what is told."""
        if error is None:
            self.close()
            return
        self._end.set()
        self._thread.join()
        if kind is not Taken:
            self.flush()

    def _run(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            try:
                self.flush()
            except Taken:
                return  # whoever calls `flush` next is told

    def push(self) -> None:
        """Push all that has changed now. StorageError if it did not arrive, Taken if it may not be pushed."""
        with self._lock:
            changed = {n: s for n, s in _stamps(self.folder, self.skip).items() if self.pushed.get(n) != s}
            if changed:
                self.may_write()
            for name in sorted(changed, key=_config_last):
                self.remote.upload(self.folder / name, name)
                self.pushed[name] = changed[name]


def push(folder: Path, remote: S3Folder) -> None:
    """Upload a folder's files, once. StorageError if it fails."""
    for name in sorted(_stamps(folder, ()), key=_config_last):
        remote.upload(folder / name, name)


def _config_last(name: str) -> tuple[str, bool, str]:
    parent, _, file = name.rpartition("/")
    return parent, file == "config.json", file


def _is_mirrored(name: str, skip: tuple[str, ...]) -> bool:
    return name.partition("/")[0] not in skip and not any(part.startswith(".") for part in name.split("/"))


def _stamps(folder: Path, skip: tuple[str, ...]) -> dict[str, Stamp]:
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: _stamp(folder / name) for name in names if _is_mirrored(name, skip)}


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
