"""Measuring a model directory, generator or teacher, in one process."""

from __future__ import annotations

from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.fid import frechet_distance, generator_statistics, heun_sampler, one_step_sampler
from sid_ray.evaluation.statistics import load_reference
from sid_ray.teachers.sources import load_denoiser


def measure_fid(
    model: str, num: int, features: str, reference: str, seed: int, steps: int = 18, batch: int = 250
) -> float:
    """FID of `num` images of the model: one evaluation each for a generator, 2 steps - 1 for a teacher.

    UserError if model, features or reference are missing or do not fit.
    """
    denoiser, config = load_denoiser(model)
    if config.kind == "generator" and config.sigma_init is not None:
        sample = one_step_sampler(denoiser, config.sigma_init, seed)
    else:
        sample = heun_sampler(denoiser, seed, steps)
    own = generator_statistics(sample, num, load_features(features), batch)
    return frechet_distance(own, load_reference(reference))
