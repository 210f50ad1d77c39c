"""Teachers with random weights: they teach nothing, and let a run of the right size be tried without any file."""

from __future__ import annotations

from pathlib import Path

import torch

from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.errors import UserError
from sid_ray.teachers.model_directory import BUILTIN, ModelConfig, read_model_config, save_new_model
from sid_ray.teachers.public import PUBLIC, public_teacher

WARNING = "RANDOM TEACHER: its weights are random numbers; this is a smoke test, and its images mean nothing"
"""What every output of such a run says."""


def untrained_config(path: str, seed: int) -> ModelConfig:
    """Configuration of a teacher of the architecture that `path` names: a model directory, or a public teacher.

    UserError if it names neither.
    """
    local = path.startswith(BUILTIN) or Path(path).expanduser().is_dir()
    if local:
        architecture = read_model_config(path, "teacher.path")
    elif public := public_teacher(path):
        architecture = ModelConfig(kind="teacher", network=public.network)
    else:
        raise UserError(
            f"teacher.random: true needs a teacher.path of known architecture, not {path!r}; allowed: a model "
            f"directory, or any path ending in one of {', '.join(PUBLIC)}"
        )
    provenance = {"random_teacher": True, "source": path.rsplit("/", 1)[-1], "seed": seed}
    changes = {"kind": "teacher", "sigma_init": None, "licence": "none: random weights", "provenance": provenance}
    return architecture.model_copy(update=changes)


def draw_untrained(config: ModelConfig) -> Denoiser:
    """The network of such a teacher, in eval mode; its weights are a function of architecture and seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.provenance["seed"])
        return config.build().eval()


def write_untrained(out: Path, path: str, seed: int) -> None:
    """Write such a teacher as a model directory; the weights are a function of architecture and seed."""
    config = untrained_config(path, seed)
    denoiser = draw_untrained(config)
    card = f"# {WARNING}\n\nArchitecture of `{config.provenance['source']}`, seed {seed}.\n"
    save_new_model(out, denoiser.state_dict(), config, card)
