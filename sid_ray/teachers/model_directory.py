"""The model directory: how a teacher or a generator lies on disk.

`model.safetensors` (float32 weights by EDM's parameter names), `config.json` (a `ModelConfig`) and
`README.md` (the model card). No pickle, and nothing is loaded that does not match exactly.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sid_ray.diffusion.denoiser import Denoiser, EDMDenoiser
from sid_ray.errors import UserError
from sid_ray.teachers.diffusers_unet import DiffusersDenoiser
from sid_ray.teachers.user_code import HANDED, is_python

FORMAT = 1
ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN = "builtin:"
"""Prefix of the teachers that come with the package, as in `builtin:digits`."""
DENOISERS: dict[str, type[Denoiser]] = {
    "SongUNet": EDMDenoiser,
    "DhariwalUNet": EDMDenoiser,
    "UNet2DModel": DiffusersDenoiser,
}
"""What a network of each `model_type` is built by."""


PYTHON_NETWORK = "python"
"""`model_type` of a network that is the user's own code: its class, its factory if it has one, and what it takes."""


class Outline(Denoiser):
    """Stands for a network whose code is not at hand: what it takes, and no weights. It cannot be called."""

    def __init__(self, image_shape: tuple[int, int, int], label_dim: int, augment_dim: int, sigma_data: float):
        super().__init__()
        self.image_shape, self.label_dim = image_shape, label_dim
        self.augment_dim, self.sigma_data = augment_dim, sigma_data


class ModelConfig(BaseModel):
    """`config.json` of a model directory."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    format: Literal[1] = 1
    """Version of this format."""
    kind: Literal["teacher", "generator"]
    """A teacher is sampled in many steps, a generator in one."""
    network: dict[str, Any]
    """The architecture: `model_type` (`SongUNet` if it is missing) and the other arguments of its denoiser. A network
    of the user's own (`python`) is named here by its class and factory; no file makes this package import it."""
    sigma_data: float = 0.5
    """Standard deviation of the training images."""
    sigma_init: float | None = None
    """Noise level of the generator's input; None for a teacher."""
    label_names: list[str] | None = None
    """Names of the classes, in order."""
    class_weights: list[float] | None = None
    """How often a generator draws each class; None: all alike."""
    licence: str = "unknown"
    """Licence of the weights; a generator inherits its teacher's."""
    provenance: dict[str, Any] = {}
    """Where the weights come from: source, its sha256, how they were made and measured."""

    @property
    def architecture(self) -> dict[str, Any]:
        """`network` without what does not matter for exchanging weights: where a factory is found."""
        return {name: value for name, value in self.network.items() if name != "factory"}

    @property
    def is_python(self) -> bool:
        """Whether the network is the user's own code."""
        return self.network.get("model_type") == PYTHON_NETWORK

    def build(self) -> Denoiser:
        """The network with fresh weights. ValueError or TypeError for an architecture that cannot be."""
        model_type = self.network.get("model_type", "SongUNet")
        if model_type not in DENOISERS:
            raise ValueError(f"unknown network {model_type!r}; allowed: {', '.join(DENOISERS)}")
        return DENOISERS[model_type](sigma_data=self.sigma_data, **self.network)

    def skeleton(self) -> Denoiser:
        """The network without memory for its weights: what it takes, and their names and shapes. Raises as `build`.

        Of a network of the user's own code, what it takes only.
        """
        n = self.network
        if self.is_python:
            return Outline(tuple(n["image_shape"]), n["label_dim"], n["augment_dim"], self.sigma_data)
        with torch.device("meta"):
            return self.build()

    def image_shape(self, field: str = "model") -> tuple[int, int, int]:
        """(channels, height, width) of its images. UserError, naming `field`, if it cannot be built."""
        try:
            return self.skeleton().image_shape
        except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{field}: its architecture cannot be built: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def save_model(directory: Path, state: dict[str, Tensor], config: ModelConfig, card: str) -> None:
    """Write a model directory; each file is replaced in one step, the configuration last.

    `state`: the denoiser's state dict; stored as contiguous float32 on the CPU.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in state.items()}
    aside = directory / f".model.safetensors.{os.getpid()}"
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.replace(directory / "model.safetensors")
    write_text(directory / "README.md", card)
    write_text(directory / "config.json", config.model_dump_json(indent=2) + "\n")


def save_new_model(out: Path, state: dict[str, Tensor], config: ModelConfig, card: str) -> None:
    """Write a model directory that is not there yet; it appears complete or not at all. UserError if it cannot."""
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_model(aside, state, config, card)
        aside.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error


def absolute(path: str) -> str:
    """The path as it means the same from any working directory; addresses and what has no path as they are."""
    if path.startswith((BUILTIN, HANDED)) or is_python(path) or "://" in path:
        return path
    return str(Path(path).expanduser().absolute())


def resolve_model(path: str, field: str = "model") -> Path:
    """The directory meant by `path`: a model directory, or `builtin:NAME`. UserError if there is none."""
    builtin = sorted(p.parent.name for p in ASSETS.glob("*/config.json"))
    if path.startswith(BUILTIN):
        directory = ASSETS / path.removeprefix(BUILTIN)
        if directory.name not in builtin:
            raise UserError(
                f"{field}: there is no built-in model {path!r}; built in: {', '.join(BUILTIN + b for b in builtin)}"
            )
        return directory
    directory = Path(path).expanduser()
    if not (directory / "config.json").is_file():
        what = "has no config.json" if directory.is_dir() else "is a file" if directory.is_file() else "does not exist"
        raise UserError(
            f"{field}: {path!r} is not a model directory ({what}); allowed: a directory with config.json and "
            "model.safetensors, an EDM checkpoint (.pkl), a diffusers folder (UNet2DModel), the s3:// or https:// "
            f"address of one, or one of {', '.join(BUILTIN + b for b in builtin)}"
        )
    return directory


def read_model_config(path: str, field: str = "model") -> ModelConfig:
    """Configuration of the model at `path`, without its weights. UserError if it is missing or malformed."""
    file = resolve_model(path, field) / "config.json"
    try:
        return ModelConfig.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{field}: {file} is not a model configuration this version reads: {error}") from error


def load_model(path: str, field: str = "model", network: Denoiser | None = None) -> tuple[Denoiser, ModelConfig]:
    """Network with its weights, in eval mode, and its configuration. UserError if anything does not match.

    `network`: takes the weights, instead of one built from the configuration; needed if that is the user's own code.
    """
    config = read_model_config(path, field)
    if config.is_python and network is None:
        raise UserError(
            f"{field}: {path!r} holds weights of {config.network['class_name']}, which is code of yours; nothing is "
            "imported because a file names it. Give the network: load_generator(path, network=...) in Python, "
            f"--network {config.network['factory'] or 'python:package.module:factory'} on the command line"
        )
    weights = resolve_model(path, field) / "model.safetensors"
    try:
        denoiser = config.build() if network is None else network
        denoiser.load_state_dict(load_file(weights), strict=True)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{field}: {weights} does not hold the weights that config.json describes: {error}") from error
    return denoiser.eval(), config
