"""One owner at a time: a small record beside the data, renewed while its owner lives.

The record is replaced only by comparing and swapping (under a file lock, or by S3's conditional put). No clocks
are compared: a waiting process takes a lease over when it has seen no renewal for as long as the record says.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import psutil
from filelock import FileLock
from pydantic import BaseModel, ValidationError

from sid_ray.errors import UserError
from sid_ray.storage.s3 import S3Folder

LEASE_SECONDS = 30.0
"""A lease that was not renewed for so long may be taken over."""
RENEW_SECONDS = 5.0
HELD: set[str] = set()
"""Owners in this process, which may have failed to give back a lease that it no longer holds."""


class Taken(Exception):
    """Another process has taken over the lease: this one may write nothing more."""


class Record(BaseModel):
    """Who holds a lease."""

    owner: str
    """Unique to one taking of the lease."""
    host: str
    machine: str
    """Tells machines (and containers) of the same host name apart, and changes when one starts anew."""
    pid: int
    started: float
    """When the process started, which tells a pid that was used again."""
    since: str
    """When the lease was taken, for people."""
    seconds: float
    """Without a renewal for so long it has expired."""
    renewals: int = 0

    def is_here(self) -> bool:
        """Whether the owner's process would be visible from here."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def is_alive(self) -> bool:
        """Whether the owner, whose process is visible from here, is still there."""
        if self.pid == os.getpid():
            return self.owner in HELD
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Place(Protocol):
    """Where a lease's record lies."""

    def read(self) -> tuple[str, str] | None:
        """(record, tag) or None if there is none. OSError if it cannot be read."""
        ...

    def swap(self, record: str | None, tag: str | None) -> bool:
        """Replace the record with this tag (None: there is none) by another (None: delete it); False if it changed."""
        ...


class FilePlace:
    """A lease's record in a local or shared folder."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> tuple[str, str] | None:
        """The record, which is its own tag."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return text, text

    def swap(self, record: str | None, tag: str | None) -> bool:
        """Compare and replace under a lock beside the record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            found = self.read()
            if (found and found[1]) != tag:
                return False
            if record is None:
                self.path.unlink(missing_ok=True)
            else:
                aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
                aside.write_text(record, encoding="utf-8")
                aside.replace(self.path)
        return True


class S3Place:
    """A lease's record on S3."""

    def __init__(self, folder: S3Folder, name: str):
        self.folder, self.name = folder, name

    def read(self) -> tuple[str, str] | None:
        """The record and its ETag."""
        found = self.folder.read(self.name)
        return None if found is None else (found[0].decode("utf-8", "replace"), found[1])

    def swap(self, record: str | None, tag: str | None) -> bool:
        """A conditional put or delete."""
        return self.folder.swap(self.name, None if record is None else record.encode(), tag)


class Lease:
    """A lease that this process holds, and renews in a thread until it is released.

    `on_loss` is called, in that thread, if another process has taken it over nevertheless (after this one was
    suspended or cut off for longer than it lasts).
    """

    def __init__(self, place: Place, record: Record, on_loss: Callable[[str], None]):
        self.place, self.record, self.on_loss = place, record, on_loss
        HELD.add(record.owner)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @property
    def owner(self) -> str:
        """Unique to this lease."""
        return self.record.owner

    def release(self) -> None:
        """Give the lease back, if it is still held."""
        self._end.set()
        self._thread.join()
        HELD.discard(self.owner)
        try:
            found = self.place.read()
            if found and _owner(found[0]) == self.owner:
                self.place.swap(None, found[1])
        except OSError:
            pass  # it will expire

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _keep(self) -> None:
        renewed = time.monotonic()
        while not self._end.wait(RENEW_SECONDS):
            try:
                found = self.place.read()
                if found and _owner(found[0]) != self.owner:
                    return self.on_loss(f"{describe(found[0])} has taken it over")
                if found is None and time.monotonic() - renewed > self.record.seconds:
                    return self.on_loss("another process has taken it over and ended")
                self.record = self.record.model_copy(update={"renewals": self.record.renewals + 1})
                if self.place.swap(self.record.model_dump_json(), found and found[1]):
                    renewed = time.monotonic()
            except OSError:
                continue  # storage that fails for a while; the next renewal may reach it


def refuse_if_in_use(place: Place, what: str) -> None:
    """UserError if a live process of this machine holds the lease; nothing is written."""
    found = place.read()
    record = found and _parse(found[0])
    if record and record.is_here() and record.is_alive():
        raise UserError(f"{what} is in use by {record}; stop it, or choose another --run.name")


def take_lease(
    place: Place,
    what: str,
    say: Callable[[str], None],
    on_loss: Callable[[str], None] = lambda reason: None,
    seconds: float = LEASE_SECONDS,
) -> Lease:
    """Take the lease on `what`; a dead owner's is taken over, an unknown one's when it has expired, saying so.

    UserError if a live process holds it. OSError if the storage fails.
    """
    record = Record(
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        seconds=seconds,
    )
    while True:
        refuse_if_in_use(place, what)
        found = place.read()
        if found:
            _wait_if_it_may_live(place, found[0], what, say)
        if place.swap(record.model_dump_json(), found and found[1]):
            return Lease(place, record, on_loss)
        again = place.read()
        if again and _owner(again[0]) == record.owner:  # S3 had done it, but the answer was lost
            return Lease(place, record, on_loss)


def holds(place: Place, owner: str) -> bool:
    """Whether the lease has not been taken over by another owner. OSError if that cannot be known."""
    found = place.read()
    return found is None or _owner(found[0]) == owner


def describe(text: str) -> str:
    """A record as a person would say it."""
    return str(_parse(text) or "an unknown process")


def _wait_if_it_may_live(place: Place, text: str, what: str, say: Callable[[str], None]) -> None:
    """Return once the record's owner is known to be gone; UserError if it renews."""
    record = _parse(text)
    if record and record.is_here():
        say(f"{what} was left by {record}, which has ended; it is taken over")
        return
    seconds = record.seconds if record else LEASE_SECONDS
    say(f"{what} is in use by {describe(text)}; waiting at most {seconds:.0f} s whether it is renewed")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 10))
        found = place.read()
        if found is None:
            return
        if found[0] != text:
            raise UserError(f"{what} is in use by {describe(found[0])}; stop it, or choose another --run.name")


def _parse(text: str) -> Record | None:
    try:
        return Record.model_validate_json(text)
    except ValidationError:
        return None


def _owner(text: str) -> str | None:
    record = _parse(text)
    return record.owner if record else None


def _machine() -> str:
    """The running instance of this machine's system, and the container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{uuid.getnode():x} {psutil.boot_time():.0f}"
