"""The run directory: what lies where, on a disk or on S3."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from sid_ray.config import Config, parse_config
from sid_ray.errors import UserError
from sid_ray.storage import cache_folder
from sid_ray.storage.depot import Depot, S3Depot
from sid_ray.storage.lease import FilePlace, Place, S3Place, Taken, holds
from sid_ray.storage.mirror import Mirror, pull
from sid_ray.storage.s3 import S3Folder
from sid_ray.teachers.modules import Handed
from sid_ray.teachers.start import Start
from sid_ray.teachers.untrained import untrained_config

LEASE = "lease.json"
APART = ("checkpoints", LEASE)
"""What the mirror of a run on S3 leaves to others; names that begin with a dot stay on each machine."""
WRITE_ONLY = ("samples", "tensorboard", "fid.png", "error.log")
"""What a run writes and never reads, so that it need not be pulled."""


@dataclass(frozen=True)
class RunDirectory:
    """`<storage>/<name>/` of one run; on S3, each machine's working copy of it."""

    path: Path
    remote: S3Folder | None = None
    """Where the run lies, if that is on S3."""
    owner: str | None = None
    """The lease under which this process writes; None: none was taken (a part of a run, alone in a test)."""

    @classmethod
    def of(cls, config: Config, owner: str | None = None) -> RunDirectory:
        """The absolute directory of a configuration's run."""
        storage = config.run.storage.rstrip("/")
        if not storage.startswith("s3://"):
            return cls(Path(storage).expanduser().absolute() / config.run.name, None, owner)
        copies = cache_folder() / "runs" / hashlib.sha256(storage.encode()).hexdigest()[:16]
        return cls(copies / config.run.name, S3Folder(f"{storage}/{config.run.name}"), owner)

    def address(self, path: Path) -> str:
        """Where a path of this directory is for everyone: its `s3://` address, or the path itself."""
        if self.remote is None:
            return str(path)
        return "/".join((self.remote.address, *path.relative_to(self.path).parts))

    @property
    def depot(self) -> Depot:
        """Where the checkpoints lie."""
        if self.remote is None:
            return Depot(self.checkpoints)
        return S3Depot(self.checkpoints, self.remote / self.checkpoints.name)

    @property
    def lease(self) -> Place:
        """Where the record of the run's owner lies."""
        return FilePlace(self.path / LEASE) if self.remote is None else S3Place(self.remote, LEASE)

    def top_level(self) -> set[str]:
        """Names of the files and folders in it, where it really lies. OSError if that cannot be seen."""
        if self.remote is not None:
            return {name.partition("/")[0] for name in self.remote.objects()}
        return {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()

    def pull(self) -> None:
        """Bring this machine's working copy up to date; nothing to do if it is the run itself."""
        if self.remote is not None:
            pull(self.path, self.remote, (*APART, *WRITE_ONLY))

    def mirror(self, note: Callable[[str], None]) -> Mirror | None:
        """What pushes this working copy while a worker writes in it; None if it is the run itself."""
        return None if self.remote is None else Mirror(self.path, self.remote, APART, note, self.check_owner)

    def check_owner(self) -> None:
        """Taken if another process has taken over the run. OSError if that cannot be known."""
        if self.owner is not None and not holds(self.lease, self.owner):
            raise Taken(f"{self.address(self.path)} was taken over by another process; nothing more is written")

    def record_failure(self, who: str, text: str) -> None:
        """Add a traceback to error.log, if that can be written at all."""
        try:
            with self.error_log.open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {who}:\n{text}\n")
            if self.remote is not None:
                self.remote.upload(self.error_log, self.error_log.name)
        except OSError:
            pass  # the failure itself is on its way to the terminal

    @property
    def config_yaml(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints; see `training.checkpoints`."""
        return self.path / "checkpoints"

    @property
    def generator(self) -> Path:
        """Model directory of the best average so far."""
        return self.path / "generator"

    @property
    def teacher(self) -> Path:
        """Model directory of a teacher that came in another format, or of a random one."""
        return self.path / "teacher"

    @property
    def rollbacks(self) -> Path:
        """The rollbacks so far; see `training.rollback`."""
        return self.path / "rollbacks.json"

    @property
    def student(self) -> Path:
        """Weights of a student of its own after its fit to the teacher (safetensors)."""
        return self.path / "student.safetensors"

    @property
    def reference(self) -> Path:
        """Reference statistics made from the teacher's samples."""
        return self.path / "reference.npz"

    @property
    def averages(self) -> Path:
        """Averages that wait for their FID; see `training.evaluations`."""
        return self.path / "averages"

    @property
    def samples(self) -> Path:
        """Sample grids."""
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        """All scalars, a JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def fid_plot(self) -> Path:
        """The FID curve."""
        return self.path / "fid.png"

    @property
    def summary(self) -> Path:
        """The final counters (`Progress` as JSON); there once the run has ended."""
        return self.path / "summary.json"

    @property
    def ray(self) -> Path:
        """Ray's own files, a fresh folder per launch."""
        return self.path / ".ray"

    @property
    def error_log(self) -> Path:
        """Traceback of the last failure."""
        return self.path / "error.log"


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """UserError, which says `what` failed, for an OSError inside."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run.storage: {what}: {error}") from error


def read_config(run: RunDirectory) -> Config | None:
    """The configuration of an existing run; None if there is none."""
    if not run.config_yaml.is_file():
        return None
    return parse_config(yaml.safe_load(run.config_yaml.read_text(encoding="utf-8")))


def start_of(config: Config, run: RunDirectory, handed: Handed = Handed()) -> Start:
    """The networks of a run, also before it has begun; `handed` are those that its program handed over."""
    drawn = config.teacher.random and not run.teacher.is_dir()
    untrained = untrained_config(config.teacher.path, config.run.seed) if drawn else None
    return Start(config, teacher_directory(config, run), handed, untrained)


def teacher_directory(config: Config, run: RunDirectory) -> str:
    """Where every worker reads the teacher: the run's own copy, converted or random, if it has one; `teacher.path`."""
    return str(run.teacher) if run.teacher.is_dir() else config.teacher.path
