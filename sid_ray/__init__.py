"""sid-ray: distil a diffusion model into a one-step generator.

    from sid_ray import distill, load_config, load_generator, load_teacher
    result = distill("digits", overrides={"run.total_kimg": 64})
    images = load_generator(result.generator).sample(64)

Importing this is quick: torch, Ray and DeepSpeed come in when a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sid_ray.config import load_config
    from sid_ray.diffusion.denoiser import Denoiser
    from sid_ray.launch.sweeps.sweep import sweep
    from sid_ray.launch.trainer import distill
    from sid_ray.teachers.mixture import GaussianMixture
    from sid_ray.teachers.sources import load_generator, load_teacher

__version__ = "0.1.0"
__all__ = ["Denoiser", "GaussianMixture", "distill", "load_config", "load_generator", "load_teacher", "sweep"]

_HOMES = {
    "Denoiser": "sid_ray.diffusion.denoiser",
    "GaussianMixture": "sid_ray.teachers.mixture",
    "distill": "sid_ray.launch.trainer",
    "load_config": "sid_ray.config",
    "load_generator": "sid_ray.teachers.sources",
    "load_teacher": "sid_ray.teachers.sources",
    "sweep": "sid_ray.launch.sweeps.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sid_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
