"""Opening a run: whether a configuration may run there, who owns it, and what is written first."""

from __future__ import annotations

import os
from collections.abc import Callable

from sid_ray.config import TEACHER_REFERENCE, Config, differences, parse_config, settled_as
from sid_ray.diffusion.augment import LABELS
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.errors import UserError
from sid_ray.evaluation.features import absolute_features, load_features
from sid_ray.evaluation.statistics import check_fits, load_reference
from sid_ray.storage.lease import Lease, refuse_if_in_use, take_lease
from sid_ray.storage.mirror import push
from sid_ray.teachers.model_directory import absolute, read_model_config, write_text
from sid_ray.teachers.modules import Handed
from sid_ray.teachers.sources import convert, find_source, is_model_directory
from sid_ray.teachers.untrained import write_untrained
from sid_ray.training.run_directory import (
    LEASE,
    RunDirectory,
    read_config,
    start_of,
    storage_errors,
    teacher_directory,
)


def check_inputs(config: Config, handed: Handed = Handed()) -> None:
    """UserError unless teacher, student, warm starts, features and reference are there and fit together."""
    run = RunDirectory.of(config)
    check_teacher_is_the_same(config, run)
    student = start_of(config, run, handed).check()
    check_method(config, student)
    if config.evaluation.num_images:
        check_measure(config, student.image_shape)


def check_measure(config: Config, image_shape: tuple[int, int, int]) -> None:
    """UserError unless feature network and reference are there and fit each other and the images (C, H, W)."""
    e = config.evaluation
    features = load_features(e.features, image_shape, e.detector)
    if e.reference != TEACHER_REFERENCE:
        check_fits(load_reference(e.reference), features, f"evaluation.reference: {e.reference}")


def check_method(config: Config, network: Denoiser) -> None:
    """UserError unless what the method and the engine ask of a network is possible with this one."""
    if config.method.augment > 0 and network.augment_dim != len(LABELS):
        raise UserError(
            f"method.augment: {config.method.augment} needs a network with {len(LABELS)} augmentation labels; this "
            f"one has {network.augment_dim}; allowed: 0"
        )
    if config.engine.activation_checkpointing:
        _check_checkpointing(network)
    weights, classes = config.method.class_weights, network.label_dim
    if weights is not None and len(weights) != classes:
        allowed = f"a list of {classes}" if classes else "none, for this teacher knows no classes"
        raise UserError(f"method.class_weights: {len(weights)} numbers do not fit the teacher; allowed: {allowed}")


def _check_checkpointing(network: Denoiser) -> None:
    field = "engine.activation_checkpointing: true"
    if not isinstance(network, Denoiser):
        raise UserError(f"{field} is only for networks that derive from sid_ray.Denoiser; allowed: false")
    try:
        network.set_activation_checkpointing(True)
    except ValueError as error:
        raise UserError(f"{field}: {error}; allowed: false") from error
    network.set_activation_checkpointing(False)


def check_workers(config: Config, workers: int) -> None:
    """UserError if the configuration cannot be cut over this many workers; nothing while its slots are not settled."""
    if config.engine.micro_batch == "auto":
        return
    if config.method.latents == "shared" and config.num_slots > workers:
        raise UserError(
            f"method.latents: 'shared' needs one micro-batch per worker, but batch.size {config.batch.size} makes "
            f"{config.num_slots} of engine.micro_batch {config.micro_batch} for {workers} worker(s)"
        )


def as_recorded(config: Config, run: RunDirectory) -> Config:
    """The configuration with what the run has settled before where it says `auto`; itself for a new run."""
    old = read_config(run)
    return config if old is None else settled_as(config, old)


def absolute_paths(config: Config) -> Config:
    """The configuration with paths that mean the same from any working directory."""
    tree = config.model_dump()
    tree["teacher"]["path"] = absolute(config.teacher.path)
    if config.evaluation.reference != TEACHER_REFERENCE:
        tree["evaluation"]["reference"] = absolute(config.evaluation.reference)
    tree["evaluation"]["detector"] = absolute(config.evaluation.detector)
    tree["evaluation"]["features"] = absolute_features(config.evaluation.features)
    tree["run"]["storage"] = absolute(config.run.storage)
    tree["init"] |= {k: absolute(v) for k, v in tree["init"].items() if isinstance(v, str)}
    return parse_config(tree)


def claim(
    config: Config, say: Callable[[str], None], on_loss: Callable[[str], None], handed: Handed = Handed()
) -> Lease:
    """Take the run for this process, before anything is written; see `storage.lease.take_lease`.

    UserError, with nothing touched, if the configuration cannot run there or a live process holds the run.
    """
    run = RunDirectory.of(config)
    what, cannot = run.address(run.path), _cannot_be_written(config)
    with storage_errors(cannot):
        refuse_if_in_use(run.lease, what)
        run.pull()
    check_inputs(config, handed)
    _changes(config, run)
    with storage_errors(cannot):
        return take_lease(run.lease, what, say, on_loss)


def open_run(config: Config, owner: str | None = None, handed: Handed = Handed()) -> tuple[RunDirectory, list[str]]:
    """Create or reopen the run's directory; returns it and the fields in which a resumed run now differs.

    `owner`: the lease that `claim` took. UserError, with nothing touched, if inputs are missing, the storage cannot
    be written, or the directory holds a run of a configuration that this one may not continue.
    """
    run, cannot = RunDirectory.of(config, owner), _cannot_be_written(config)
    with storage_errors(cannot):
        run.pull()
    if owner is None:
        check_inputs(config, handed)
    changed = _changes(config, run)
    with storage_errors(cannot):
        run.path.mkdir(parents=True, exist_ok=True)
        probe = run.path / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
        write_text(run.config_yaml, as_recorded(config, run).to_yaml())
    had_its_own = run.teacher.is_dir()
    if config.teacher.random and not had_its_own:
        write_untrained(run.teacher, config.teacher.path, config.run.seed)
    elif not is_model_directory(teacher_directory(config, run), "teacher.path"):
        convert(config.teacher.path, run.teacher, config.teacher.licence, "teacher.path")
    if run.remote is not None:
        with storage_errors(cannot):
            run.remote.upload(run.config_yaml, run.config_yaml.name)
            if run.teacher.is_dir() and not had_its_own:
                push(run.teacher, run.remote / run.teacher.name)
    return run, changed


def _cannot_be_written(config: Config) -> str:
    return f"{config.run.storage!r} cannot be written"


def _changes(config: Config, run: RunDirectory) -> list[str]:
    """Fields in which a run in this directory would be continued differently; UserError if it may not be."""
    old = read_config(run)
    if old is not None:
        changed, refused = differences(old, settled_as(config, old))
        if refused:
            raise UserError(
                f"run.name: {run.address(run.path)} holds a run of another configuration; these fields differ and may "
                "not change on resume:\n  " + "\n  ".join(refused) + "\nChoose another --run.name, or give the old "
                "values."
            )
        return changed
    if any(name != LEASE and not name.startswith(".") for name in run.top_level()):
        raise UserError(f"run.name: {run.address(run.path)} is not empty and holds no run; choose another --run.name")
    return []


def check_teacher_is_the_same(config: Config, run: RunDirectory) -> None:
    """UserError if the source that the run converted has changed since; one that is gone is not needed any more."""
    if not run.teacher.is_dir():
        return
    recorded = read_model_config(str(run.teacher), "teacher.path").provenance.get("source_sha256")
    if recorded is None:
        return  # random weights: they come from no source
    try:
        source = find_source(config.teacher.path, "teacher.path")
    except UserError:
        return  # its address has nothing any more, or cannot be reached
    if source.path.exists() and (source.format is None or source.format.digest(source.path) != recorded):
        raise UserError(
            f"teacher.path: {config.teacher.path} is not the file that this run began with; choose another --run.name"
        )
