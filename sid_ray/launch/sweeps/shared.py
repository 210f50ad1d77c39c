"""What all trials of a sweep share, and is made once: a converted teacher, reference statistics from its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sid_ray.config import TEACHER_REFERENCE, Config, override
from sid_ray.launch.sweeps.journal import SweepDirectory
from sid_ray.storage.mirror import push
from sid_ray.teachers.sources import convert, is_model_directory
from sid_ray.training.opening import check_inputs, check_teacher_is_the_same
from sid_ray.training.run_directory import RunDirectory


def share(base: Config, directory: SweepDirectory, note: Callable[[str], None]) -> dict[str, Any]:
    """The dotted fields by which trials use what is shared; makes it if it is not there. UserError as in `distill`.

    `base`: the configuration of all trials, with absolute paths.
    """
    fields: dict[str, Any] = {}
    if not base.teacher.random and not is_model_directory(base.teacher.path, "teacher.path"):
        local = directory.path / "teacher"
        check_teacher_is_the_same(base, RunDirectory(directory.path))
        if not local.is_dir():
            note(f"converting the teacher {base.teacher.path}, once for all trials")
            convert(base.teacher.path, local, base.teacher.licence, "teacher.path")
            if directory.remote is not None:
                push(local, directory.remote / "teacher")
        fields["teacher.path"] = f"{directory.address}/teacher"
    config = override(base, {**fields, "run.storage": directory.trials})
    check_inputs(config)
    if config.evaluation.reference == TEACHER_REFERENCE:
        name = "reference.npz"
        if not (directory.path / name).is_file():
            note("reference statistics from the teacher's samples, once for all trials")
            _make_reference(config, directory, name)
        fields["evaluation.reference"] = f"{directory.address}/{name}"
    return fields


def _make_reference(config: Config, directory: SweepDirectory, name: str) -> None:
    """Statistics of `evaluation.num_images` samples of the teacher."""
    from sid_ray.evaluation.features import load_features
    from sid_ray.evaluation.fid import generator_statistics, heun_sampler
    from sid_ray.evaluation.parts import local_device
    from sid_ray.evaluation.statistics import ReferenceStatistics, save_reference
    from sid_ray.teachers.sources import load_denoiser
    from sid_ray.training.evaluator import REFERENCE_SEEDS

    e, device = config.evaluation, local_device()
    teacher = load_denoiser(config.teacher.path, "teacher.path")[0].to(device).eval().requires_grad_(False)
    features = load_features(e.features, teacher.image_shape, e.detector).to(device)
    sample = heun_sampler(teacher, e.seed + REFERENCE_SEEDS, e.teacher_steps, device, config.method.class_weights)
    s = generator_statistics(sample, e.num_images, features, e.batch, 0, 1)
    save_reference(
        directory.path / name, ReferenceStatistics(s.mean.numpy(), s.covariance.numpy(), s.num, features.name)
    )
    directory.publish(name)
