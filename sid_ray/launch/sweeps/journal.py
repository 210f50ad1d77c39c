"""The journal of a sweep: a small JSON file per trial, which is all that a repeated command needs to go on.

    <storage>/<sweep>/
        sweep.yaml            the space with its base configuration, as it began
        journal/t003-s1.json  trial 3 with seed 1: its values, its state, its FID curve
        trials/t003-s1/       its run directory, like that of any run
        teacher/ reference.npz   what all trials share, where it had to be made
        report.md, *.png, best.yaml, best/   the outcome

On S3 the trials write there themselves, and this machine's working copy holds the rest.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sid_ray.config import Config
from sid_ray.storage import cache_folder
from sid_ray.storage.lease import FilePlace, Place, S3Place
from sid_ray.storage.mirror import pull
from sid_ray.storage.s3 import S3Folder
from sid_ray.teachers.model_directory import write_text

LEASE = "lease.json"

State = Literal["running", "finished", "diverged", "behind", "failed"]
"""`running`: begun and not ended, also when nobody works on it now. `behind`: given up as hopeless."""
ENDED: tuple[State, ...] = ("finished", "diverged", "behind")
"""States in which a trial needs no more work; a failed one is tried again by the next command."""


class TrialRecord(BaseModel):
    """What is known of one run of a trial."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    name: str
    """Name of its run; stable, whatever order trials run in."""
    number: int
    """Which trial: runs of the same number differ in their seed alone."""
    repeat: int
    """Which of its seeds."""
    values: dict[str, Any]
    """The searched fields, dotted."""
    state: State = "running"
    reason: str = ""
    """Why it ended before its budget."""
    curve: list[tuple[int, float]] = []
    """(images, FID) in order; an FID may be nan."""
    nimg: int = 0
    """Images trained."""
    seconds: float = 0.0
    """Time that it ran, start-up included."""
    fresh_fids: list[float] = []
    """FIDs of its best generator with fresh latents."""

    @property
    def best_fid(self) -> float:
        """The lowest finite FID after its start; inf if there is none."""
        return min((fid for nimg, fid in self.curve if nimg > 0 and math.isfinite(fid)), default=math.inf)

    @property
    def last_fid(self) -> float:
        """The latest FID; nan if there is none."""
        return self.curve[-1][1] if self.curve else math.nan

    def fid_at(self, nimg: int) -> float:
        """The last FID measured by then; nan if there is none."""
        return next((fid for n, fid in reversed(self.curve) if n <= nimg), math.nan)

    @property
    def ended(self) -> bool:
        """Whether it needs no more work."""
        return self.state in ENDED

    def after(self, nimg: int, fid: float) -> TrialRecord:
        """With one more evaluation; what was measured there before or later, ahead of an interruption, is replaced."""
        curve = [point for point in self.curve if point[0] < nimg]
        return self.model_copy(update={"curve": [*curve, (nimg, fid)], "nimg": nimg})


@dataclass(frozen=True)
class SweepDirectory:
    """`<storage>/<name>/` of a sweep; on S3, this machine's working copy of it."""

    path: Path
    remote: S3Folder | None = None

    @classmethod
    def of(cls, config: Config) -> SweepDirectory:
        """The directory of a sweep whose storage and name are those of this configuration's run."""
        storage = config.run.storage.rstrip("/")
        if not storage.startswith("s3://"):
            return cls(Path(storage).expanduser().absolute() / config.run.name)
        copies = cache_folder() / "sweeps" / hashlib.sha256(storage.encode()).hexdigest()[:16]
        return cls(copies / config.run.name, S3Folder(f"{storage}/{config.run.name}"))

    @property
    def address(self) -> str:
        """Where it is for everyone."""
        return str(self.path) if self.remote is None else self.remote.address

    @property
    def shown(self) -> str:
        """The same as a user here would type it."""
        if self.remote is None and self.path.is_relative_to(Path.cwd()):
            return str(self.path.relative_to(Path.cwd()))
        return self.address

    @property
    def trials(self) -> str:
        """Storage of the trials' runs."""
        return f"{self.address}/trials"

    @property
    def lease(self) -> Place:
        """Where the record of the sweep's owner lies."""
        return FilePlace(self.path / LEASE) if self.remote is None else S3Place(self.remote, LEASE)

    def pull(self) -> None:
        """Bring the working copy up to date. StorageError if S3 cannot be read."""
        if self.remote is not None:
            pull(self.path, self.remote, ("trials", LEASE))

    def is_empty(self) -> bool:
        """Whether nothing lies there."""
        return not self.path.is_dir() or all(p.name == LEASE or p.name.startswith(".") for p in self.path.iterdir())

    def write(self, name: str, text: str) -> None:
        """Write a text file whole, here and on S3."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path / name, text)
        self.publish(name)

    def publish(self, name: str) -> None:
        """Bring a file that lies here to S3, if the sweep is there."""
        if self.remote is not None:
            self.remote.upload(self.path / name, name)


class Journal:
    """The records of a sweep, read once and written as they change."""

    def __init__(self, directory: SweepDirectory):
        self.directory = directory
        files = sorted((directory.path / "journal").glob("t*.json"))
        records = [TrialRecord.model_validate_json(file.read_text(encoding="utf-8")) for file in files]
        self.records = {record.name: record for record in records}

    def put(self, record: TrialRecord) -> None:
        """Record a trial's new state."""
        self.records[record.name] = record
        self.directory.write(f"journal/{record.name}.json", record.model_dump_json(indent=1) + "\n")

    def of_number(self, number: int) -> list[TrialRecord]:
        """The runs of a trial that have begun."""
        return [record for record in self.records.values() if record.number == number]
