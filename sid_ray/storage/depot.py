"""Folders that are there whole or not at all, on a disk or on S3.

Files are written aside; a marker, written last, holds the size and sha256 of each. A folder without its marker is
not there, and one whose files are not what the marker says is damaged.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from pydantic import BaseModel, TypeAdapter, ValidationError

from sid_ray.storage.fetching import digest
from sid_ray.storage.s3 import S3Folder, StorageError

MARKER = "complete.json"
Marker = dict[str, Any]
"""Content of a marker: `files` maps a file's name to its `Entry`; the rest is the caller's."""


class Damaged(Exception):
    """A folder's files are not those that its marker promises; the message says which."""


class Entry(BaseModel):
    """What a marker says of a file."""

    size: int
    sha256: str


class Written(NamedTuple):
    """A file that has reached the disk, and S3 if the depot lies there."""

    name: str
    entry: Entry


class Depot:
    """Whole folders below a local or shared folder.

    To write one: `begin` on one worker, files into `aside(name)` and `put` for each on the worker that wrote it,
    then `commit` on one worker when all have finished. OSError from any of them leaves no folder of that name.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """Names of all folders, whole or not, in order."""
        return sorted(p.name for p in self.folder.glob("[!.]*") if p.is_dir())

    def marker(self, name: str) -> Marker | None:
        """A folder's marker; None if it is missing or unreadable."""
        try:
            return _parse_marker((self.folder / name / MARKER).read_bytes())
        except OSError:
            return None

    def problem(self, name: str) -> str | None:
        """Why a folder cannot be used, as far as names and sizes tell; None if it can."""
        try:
            entries = self._entries(name)
        except Damaged as error:
            return str(error)
        sizes = self._sizes(name)
        wrong = [file for file, entry in entries.items() if sizes.get(file) != entry.size]
        return f"{wrong[0]} is missing or has not the size it was written with" if wrong else None

    def fetch(self, name: str) -> Path:
        """The local folder with these files, all verified by sha256. Damaged if they are not as they were written."""
        for file, entry in self._entries(name).items():
            if not _is_intact(self.folder / name / file, entry):
                raise Damaged(f"{file} is not the file that was written: its checksum differs")
        return self.folder / name

    def text(self, name: str, file: str) -> str:
        """A small text file of a folder. OSError if it cannot be read."""
        return (self.folder / name / file).read_text(encoding="utf-8")

    def where(self, name: str) -> str:
        """A folder's address, for people."""
        return str(self.folder / name)

    def aside(self, name: str) -> Path:
        """Where a folder's files are written."""
        return self.folder / f".{name}.partial"

    def begin(self, name: str) -> None:
        """Make room for a folder; an unusable one of that name is removed."""
        shutil.rmtree(self.aside(name), ignore_errors=True)
        self.remove(name)
        self.aside(name).mkdir(parents=True)

    def put(self, name: str, file: str) -> Written:
        """Bring a file that lies aside to safety; returns what its marker entry will be."""
        path = self.aside(name) / file
        _sync(path)
        return Written(file, Entry(size=path.stat().st_size, sha256=digest(path)))

    def commit(self, name: str, files: list[Written], **more: Any) -> None:
        """Write the marker; from here on the folder is there. `more` goes into the marker."""
        aside = self.aside(name)
        (aside / MARKER).write_bytes(_marker_text(files, more))
        _sync(aside / MARKER)
        _sync(aside)
        aside.rename(self.folder / name)
        _sync(self.folder)

    def abandon(self, name: str) -> None:
        """Remove what lies aside."""
        shutil.rmtree(self.aside(name), ignore_errors=True)

    def disown(self, name: str) -> None:
        """Remove a folder's marker: it is no longer there, though its files are."""
        (self.folder / name / MARKER).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a folder, its marker first."""
        self.disown(name)
        if (self.folder / name).is_dir():
            shutil.rmtree(self.folder / name)

    def _entries(self, name: str) -> dict[str, Entry]:
        try:
            return TypeAdapter(dict[str, Entry]).validate_python((self.marker(name) or {}).get("files"))
        except ValidationError as error:
            raise Damaged(f"it has no readable {MARKER}") from error

    def _sizes(self, name: str) -> dict[str, int]:
        return {p.name: p.stat().st_size for p in (self.folder / name).iterdir()}


class S3Depot(Depot):
    """Whole folders on S3, with a local folder where each machine writes and reads them.

    S3 cannot rename, so that a folder is there as soon as its marker is.
    """

    def __init__(self, folder: Path, remote: S3Folder):
        super().__init__(folder)
        self.remote = remote

    def names(self) -> list[str]:
        """Names of all folders, whole or not, in order."""
        return sorted({file.partition("/")[0] for file in self.remote.objects() if "/" in file})

    def marker(self, name: str) -> Marker | None:
        """A folder's marker; None if it is missing or unreadable."""
        found = self.remote.read(f"{name}/{MARKER}")
        return None if found is None else _parse_marker(found[0])

    def fetch(self, name: str) -> Path:
        """Download what this machine has not, once for all its workers; Damaged if S3 holds other files."""
        entries = self._entries(name)
        local = self.folder / name
        local.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            for other in self.folder.iterdir():
                if other.is_dir() and other != local and not other.name.startswith("."):
                    shutil.rmtree(other)
            for surplus in {p.name for p in local.iterdir()} - entries.keys():
                (local / surplus).unlink()
            there = self._sizes(name)
            for file, entry in entries.items():
                if _is_intact(local / file, entry):
                    continue
                if file in there:
                    self.remote.download(f"{name}/{file}", local / file)
                if not _is_intact(local / file, entry):
                    raise Damaged(f"{file} is not the file that was written: its checksum differs")
        return local

    def text(self, name: str, file: str) -> str:
        """A small text file of a folder. OSError if it cannot be read."""
        found = self.remote.read(f"{name}/{file}")
        if found is None:
            raise StorageError(f"{self.where(name)}: {file} is missing")
        return found[0].decode()

    def begin(self, name: str) -> None:
        """Make room for a folder; an unusable one of that name is removed."""
        self.remove(name)

    def aside(self, name: str) -> Path:
        """Where this machine's workers write; made when asked for."""
        aside = super().aside(name)
        aside.mkdir(parents=True, exist_ok=True)
        return aside

    def put(self, name: str, file: str) -> Written:
        """Upload a file that lies aside."""
        path = self.aside(name) / file
        written = Written(file, Entry(size=path.stat().st_size, sha256=digest(path)))
        self.remote.upload(path, f"{name}/{file}")
        return written

    def commit(self, name: str, files: list[Written], **more: Any) -> None:
        """Put the marker; from here on the folder is there."""
        sizes = self._sizes(name)
        missing = [f.name for f in files if sizes.get(f.name) != f.entry.size]
        if missing:
            raise StorageError(f"{self.remote.address}/{name}: {missing[0]} did not arrive whole")
        self.remote.write(f"{name}/{MARKER}", _marker_text(files, more))

    def where(self, name: str) -> str:
        """A folder's address, for people."""
        return f"{self.remote.address}/{name}"

    def disown(self, name: str) -> None:
        """Remove a folder's marker: it is no longer there, though its files are."""
        self.remote.delete([f"{name}/{MARKER}"])

    def remove(self, name: str) -> None:
        """Remove a folder, its marker first."""
        self.disown(name)
        self.remote.delete([f"{name}/{file}" for file in (self.remote / name).objects()])
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _sizes(self, name: str) -> dict[str, int]:
        return {file: found.size for file, found in (self.remote / name).objects().items()}


def _marker_text(files: list[Written], more: dict[str, Any]) -> bytes:
    entries = {f.name: f.entry.model_dump() for f in sorted(files, key=lambda f: f.name)}
    return json.dumps(more | {"files": entries}, indent=2).encode()


def _parse_marker(content: bytes) -> Marker | None:
    try:
        marker = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return marker if isinstance(marker, dict) else None


def _is_intact(path: Path, entry: Entry) -> bool:
    try:
        return path.stat().st_size == entry.size and digest(path) == entry.sha256
    except OSError:
        return False


def _sync(path: Path) -> None:
    """Make sure that a file's content, or a folder's names, survive a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
