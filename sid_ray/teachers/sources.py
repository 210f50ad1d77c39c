"""Where a network comes from: a model directory, a built-in one, or a checkpoint in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import OneStepGenerator
from sid_ray.errors import UserError
from sid_ray.storage import digest, fetch, is_remote
from sid_ray.teachers.checkpoint import Checkpoint
from sid_ray.teachers.diffusers_folder import diffusers_digest, is_diffusers_folder, read_diffusers_folder
from sid_ray.teachers.edm_pickle import is_edm_pickle, read_edm_pickle
from sid_ray.teachers.model_directory import (
    BUILTIN,
    ModelConfig,
    load_model,
    read_model_config,
    resolve_model,
    save_new_model,
)
from sid_ray.teachers.modules import check_denoiser, load_python
from sid_ray.teachers.user_code import HANDED, is_python

UNKNOWN_LICENCE = "unknown"


class Format(NamedTuple):
    """A foreign format, which is converted to a model directory."""

    name: str
    recognises: Callable[[Path], bool]
    """Whether a local path looks like one."""
    read: Callable[[Path, str], Checkpoint]
    """The network at a path; UserError, naming the field it came from, if it cannot be read."""
    digest: Callable[[Path], str]
    """Hex sha256 of all that makes the network."""


FORMATS = (
    Format("EDM pickle", is_edm_pickle, read_edm_pickle, digest),
    Format("diffusers folder", is_diffusers_folder, read_diffusers_folder, diffusers_digest),
)
"""Anything else is a model directory, or nothing."""


class Source(NamedTuple):
    """What a path means on this machine."""

    path: Path
    field: str
    """Where it was given, for messages; with the address if it is the copy of something remote."""
    format: Format | None
    """None: a model directory."""


def find_source(path: str, field: str = "model") -> Source:
    """What is at a path: local, `builtin:NAME`, or an s3:// or https:// address, which is fetched to this machine.

    The one place where a path becomes a file. UserError if there is nothing.
    """
    local = resolve_model(path, field) if path.startswith(BUILTIN) else fetch(path, field)
    known = next((f for f in FORMATS if f.recognises(local)), None)
    return Source(local, f"{field}: {path}" if is_remote(path) else field, known)


def is_model_directory(path: str, field: str = "model") -> bool:
    """Whether nothing needs to be converted: all that is not recognised as another format."""
    return is_python(path) or path.startswith(HANDED) or find_source(path, field).format is None


def read_foreign(source: Source, licence: str | None = None) -> tuple[dict[str, Tensor], ModelConfig]:
    """State dict and configuration of a checkpoint in a foreign format; nothing of it is executed.

    `licence` overrides what is known of the file. UserError if it cannot be read or does not hold the weights of
    the architecture that it records.
    """
    assert source.format is not None
    checkpoint = source.format.read(source.path, source.field)
    config = ModelConfig(
        kind="teacher",
        network=checkpoint.network,
        sigma_data=checkpoint.sigma_data,
        licence=licence or checkpoint.licence or UNKNOWN_LICENCE,
        provenance={
            "source": source.path.absolute().name,
            "source_sha256": source.format.digest(source.path),
            "format": source.format.name,
        },
    )
    check_state(checkpoint.state, config, f"{source.field}: {source.path}")
    return checkpoint.state, config


def check_state(state: dict[str, Tensor], config: ModelConfig, what: str) -> None:
    """UserError unless the names and shapes are the architecture's; nothing is allocated to find out."""
    try:
        expected = config.skeleton().state_dict()
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{what} records an architecture that cannot be built: {error}") from error
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    for names, problem in ((missing, "lacks"), (unknown, "has unknown"), (shapes, "has of another shape")):
        if names:
            raise UserError(f"{what} {problem} {len(names)} tensors of its architecture, e.g. {names[0]}")


def load_denoiser(path: str, field: str = "model", network: Denoiser | None = None) -> tuple[Denoiser, ModelConfig]:
    """Network with its weights, in eval mode, and its configuration, from any source. UserError if it is wrong.

    `python:package.module:factory` runs code of the user. `network`: takes a model directory's weights, instead of a
    network of the architecture that is recorded there.
    """
    if is_python(path):
        return load_python(path, field)
    source = find_source(path, field)
    if source.format is None:
        return load_model(str(source.path), source.field, network)
    state, config = read_foreign(source)
    denoiser = config.build()
    denoiser.load_state_dict(state, strict=True)
    return denoiser.eval(), config


def read_any_config(path: str, field: str = "model") -> ModelConfig:
    """Configuration of a network from any source. UserError if it cannot be read."""
    if is_python(path):
        return load_python(path, field)[1]
    source = find_source(path, field)
    return read_foreign(source)[1] if source.format else read_model_config(str(source.path), source.field)


def convert(source: str, out: Path, licence: str | None = None, field: str = "source") -> ModelConfig:
    """Write a checkpoint of a foreign format as a model directory; returns its configuration.

    UserError if the source cannot be read or `out` exists. The directory appears complete or not at all.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    found = find_source(source, field)
    if found.format is None:
        read_model_config(str(found.path), found.field)  # explains what is allowed
        raise UserError(f"{field}: {source!r} is in this format already")
    state, config = read_foreign(found, licence)
    save_new_model(out, state, config, teacher_card(config, state))
    return config


def load_teacher(path: str) -> Denoiser:
    """A frozen denoiser D(x, sigma, class_labels=None, augment_labels=None).

    `path`: a model directory, `builtin:digits`, an EDM checkpoint (.pkl), a diffusers folder, the s3:// or https://
    address of one, or `python:package.module:factory`, which is run. UserError if it cannot be used.
    """
    return load_denoiser(path, "teacher.path")[0].requires_grad_(False)


def load_generator(path: str, network: nn.Module | None = None) -> OneStepGenerator:
    """A one-step generator; `.sample(num, seed=0, class_labels=None)` draws images.

    `path`: a model directory or its s3:// address. `network`: a module of the generator's own class, which then takes
    the weights; required if that class is not this package's. UserError if it is missing, does not match, or is a
    teacher.
    """
    into = None if network is None else check_denoiser(network, "network")
    denoiser, config = load_denoiser(str(path), "generator", into)
    if config.kind != "generator" or config.sigma_init is None:
        raise UserError(f"generator: {path!r} holds a {config.kind}, not a one-step generator")
    return OneStepGenerator(denoiser, config.sigma_init, config.class_weights)


def describe(config: ModelConfig) -> dict[str, Any]:
    """What a person wants to know of a network, by name."""
    denoiser = config.skeleton()
    return {
        "network": config.network.get("model_type", "SongUNet"),
        "images": " x ".join(map(str, denoiser.image_shape)),
        "classes": denoiser.label_dim or "none",
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
