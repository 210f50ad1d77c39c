"""The run directory: what lies where, and whether a configuration may run there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from sid_ray.config import Config, differences, parse_config
from sid_ray.diffusion.augment import LABELS
from sid_ray.errors import UserError
from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.statistics import load_reference
from sid_ray.storage import digest
from sid_ray.teachers.model_directory import read_model_config, write_text
from sid_ray.teachers.sources import convert, is_model_directory, read_any_config


@dataclass(frozen=True)
class RunDirectory:
    """`<storage>/<name>/` of one run."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        """The absolute directory of a configuration's run."""
        return cls(Path(config.run.storage).expanduser().absolute() / config.run.name)

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
        """Model directory of a teacher that came in another format."""
        return self.path / "teacher"

    @property
    def rollbacks(self) -> Path:
        """The rollbacks so far; see `training.rollback`."""
        return self.path / "rollbacks.json"

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


def check_inputs(config: Config) -> None:
    """UserError unless teacher, warm starts, features and reference are there and fit together."""
    teacher = read_any_config(teacher_directory(config, RunDirectory.of(config)), "teacher.path")
    for field, path in (("init.generator", config.init.generator), ("init.fake_score", config.init.fake_score)):
        if path is not None and read_any_config(path, field).network != teacher.network:
            raise UserError(f"{field}: {path!r} is not of the teacher's architecture")
    if config.method.augment > 0 and teacher.network.get("augment_dim", 0) != len(LABELS):
        raise UserError(
            f"method.augment: {config.method.augment} needs a teacher with {len(LABELS)} augmentation labels; this "
            f"one has {teacher.network.get('augment_dim', 0)}; allowed: 0"
        )
    features, reference = load_features(config.evaluation.features), load_reference(config.evaluation.reference)
    if len(reference.mu) != features.num_features:
        raise UserError(
            f"evaluation.reference: {config.evaluation.reference!r} has {len(reference.mu)} features, "
            f"evaluation.features {config.evaluation.features!r} has {features.num_features}"
        )


def check_workers(config: Config, workers: int) -> None:
    """UserError if the configuration cannot be cut over this many workers."""
    if config.method.latents == "shared" and config.num_slots > workers:
        raise UserError(
            f"method.latents: 'shared' needs one micro-batch per worker, but batch.size {config.batch.size} makes "
            f"{config.num_slots} of engine.micro_batch {config.engine.micro_batch} for {workers} worker(s)"
        )


def read_config(run: RunDirectory) -> Config | None:
    """The configuration of an existing run; None if there is none."""
    if not run.config_yaml.is_file():
        return None
    return parse_config(yaml.safe_load(run.config_yaml.read_text(encoding="utf-8")))


def absolute_paths(config: Config) -> Config:
    """The configuration with paths that mean the same from any working directory."""

    def absolute(path: str) -> str:
        if path.startswith("builtin:") or "://" in path:
            return path
        return str(Path(path).expanduser().absolute())

    tree = config.model_dump()
    tree["teacher"]["path"] = absolute(config.teacher.path)
    tree["evaluation"]["reference"] = absolute(config.evaluation.reference)
    tree["run"]["storage"] = absolute(config.run.storage)
    tree["init"] = {k: v if v is None else absolute(v) for k, v in tree["init"].items()}
    return parse_config(tree)


def open_run(config: Config) -> tuple[RunDirectory, list[str]]:
    """Create or reopen the run's directory; returns it and the fields in which a resumed run now differs.

    UserError, with nothing touched, if inputs are missing, the storage cannot be written, or the directory
    holds a run of a configuration that this one may not continue.
    """
    if "://" in config.run.storage:
        raise UserError(f"run.storage: {config.run.storage!r} is not supported; allowed: a local or shared folder")
    check_inputs(config)
    run = RunDirectory.of(config)
    old = read_config(run)
    changed: list[str] = []
    if old is not None:
        changed, refused = differences(old, config)
        if refused:
            raise UserError(
                f"run.name: {run.path} holds a run of another configuration; these fields differ and may not change "
                "on resume:\n  " + "\n  ".join(refused) + "\nChoose another --run.name, or give the old values."
            )
    elif run.path.exists() and any(run.path.iterdir()):
        raise UserError(f"run.name: {run.path} is not empty and holds no run; choose another --run.name")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        probe = run.path / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"run.storage: {config.run.storage!r} cannot be written: {error}") from error
    write_text(run.config_yaml, config.to_yaml())
    if not is_model_directory(teacher_directory(config, run)):
        convert(config.teacher.path, run.teacher, config.teacher.licence, "teacher.path")
    return run, changed


def teacher_directory(config: Config, run: RunDirectory) -> str:
    """Where the run reads its teacher: its own converted copy if there is one, else `teacher.path`.

    UserError if the file that was converted has changed since.
    """
    if not run.teacher.is_dir():
        return config.teacher.path
    source = Path(config.teacher.path).expanduser()
    recorded = read_model_config(str(run.teacher), "teacher.path").provenance.get("source_sha256")
    if source.is_file() and digest(source) != recorded:
        raise UserError(f"teacher.path: {source} is not the file that this run began with; choose another --run.name")
    return str(run.teacher)
