"""Where a network comes from: a model directory, a built-in one, or a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sid_ray.diffusion.denoiser import EDMDenoiser
from sid_ray.diffusion.generator import OneStepGenerator
from sid_ray.errors import UserError
from sid_ray.storage import digest
from sid_ray.teachers.edm_pickle import read_edm_pickle
from sid_ray.teachers.model_directory import (
    BUILTIN,
    ModelConfig,
    load_model,
    read_model_config,
    resolve_model,
    save_new_model,
)
from sid_ray.teachers.public import EDM_LICENCE

EDM_NAMES = ("edm-", "sid-", "sida-")
"""How the names begin of EDM's checkpoints and of what SiD's authors made from them, all under EDM's licence."""
UNKNOWN_LICENCE = "unknown"


def is_model_directory(path: str) -> bool:
    """Whether the path is in the project's own format (or built in), so that nothing needs to be converted."""
    return path.startswith(BUILTIN) or (Path(path).expanduser() / "config.json").is_file()


def read_source(path: str, field: str = "model", licence: str | None = None) -> tuple[dict[str, Tensor], ModelConfig]:
    """State dict and configuration of a checkpoint in a foreign format; nothing of it is executed.

    `licence` overrides what is known of the file. UserError, naming `field`, if it cannot be read, is not a
    format this version knows, or does not hold the weights of the architecture that it records.
    """
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix != ".pkl":
        resolve_model(path, field)  # explains what is allowed
    checkpoint = read_edm_pickle(file, field)
    config = ModelConfig(
        kind="teacher",
        network=checkpoint.network,
        sigma_data=checkpoint.sigma_data,
        licence=licence or (EDM_LICENCE if file.name.startswith(EDM_NAMES) else UNKNOWN_LICENCE),
        provenance={"source": file.name, "source_sha256": digest(file), "format": "EDM pickle"},
    )
    check_state(checkpoint.state, config, f"{field}: {path}")
    return checkpoint.state, config


def check_state(state: dict[str, Tensor], config: ModelConfig, what: str) -> None:
    """UserError unless the names and shapes are the architecture's; nothing is allocated to find out."""
    try:
        with torch.device("meta"):
            expected = config.build().state_dict()
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{what} records an architecture that cannot be built: {error}") from error
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    for names, problem in ((missing, "lacks"), (unknown, "has unknown"), (shapes, "has of another shape")):
        if names:
            raise UserError(f"{what} {problem} {len(names)} tensors of its architecture, e.g. {names[0]}")


def load_denoiser(path: str, field: str = "model") -> tuple[EDMDenoiser, ModelConfig]:
    """Network with its weights, in eval mode, and its configuration, from any source. UserError if it is wrong."""
    if is_model_directory(path):
        return load_model(path, field)
    state, config = read_source(path, field)
    denoiser = config.build()
    denoiser.load_state_dict(state, strict=True)
    return denoiser.eval(), config


def read_any_config(path: str, field: str = "model") -> ModelConfig:
    """Configuration of a network from any source. UserError if it cannot be read."""
    return read_model_config(path, field) if is_model_directory(path) else read_source(path, field)[1]


def convert(source: str, out: Path, licence: str | None = None, field: str = "source") -> ModelConfig:
    """Write a checkpoint of a foreign format as a model directory; returns its configuration.

    UserError if the source cannot be read or `out` exists. The directory appears complete or not at all.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    if is_model_directory(source):
        raise UserError(f"{field}: {source!r} is in this format already")
    state, config = read_source(source, field, licence)
    save_new_model(out, state, config, teacher_card(config, state))
    return config


def load_teacher(path: str) -> EDMDenoiser:
    """A frozen denoiser D(x, sigma, class_labels=None, augment_labels=None).

    `path`: a model directory, `builtin:digits`, or an EDM checkpoint (.pkl). UserError if it cannot be used.
    """
    return load_denoiser(path, "teacher.path")[0].requires_grad_(False)


def load_generator(path: str) -> OneStepGenerator:
    """A one-step generator from a model directory; `.sample(num, seed=0, class_labels=None)` draws images.

    UserError if it is missing, does not match, or is a teacher.
    """
    denoiser, config = load_denoiser(str(path), "generator")
    if config.kind != "generator" or config.sigma_init is None:
        raise UserError(f"generator: {path!r} holds a {config.kind}, not a one-step generator")
    return OneStepGenerator(denoiser, config.sigma_init, config.class_weights)


def describe(config: ModelConfig) -> dict[str, Any]:
    """What a person wants to know of a network, by name."""
    network = config.network
    return {
        "network": network.get("model_type", "SongUNet"),
        "images": f"{network['img_channels']} x {network['img_resolution']} x {network['img_resolution']}",
        "classes": network.get("label_dim") or "none",
        "licence": config.licence,
    }


def teacher_card(config: ModelConfig, state: dict[str, Tensor]) -> str:
    """README.md of a converted teacher."""
    numel = sum(t.numel() for t in state.values())
    lines = "\n".join(f"- {key}: {value}" for key, value in describe(config).items())
    return f"""# Diffusion teacher

Converted from `{config.provenance["source"]}` (sha256 {config.provenance["source_sha256"]}).

{lines}
- parameters and buffers: {numel:,}

```python
from sid_ray import load_teacher
denoiser = load_teacher("PATH")  # D(x, sigma, class_labels)
```
"""
