"""Folders that diffusers writes: a pipeline of a UNet2DModel and its scheduler, or the UNet alone.

Only JSON, safetensors and the head of README.md are read; no weights in pickles, no pipeline's own code.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from sid_ray.errors import UserError
from sid_ray.storage import digest
from sid_ray.teachers.checkpoint import Checkpoint
from sid_ray.teachers.diffusers_unet import Schedule, UNetArguments, import_diffusers

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
"""Classes whose networks were trained on the discrete VP schedule that the scheduler's fields describe."""
WEIGHTS, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attention's weights before diffusers 0.15, and since."""


class Folder(NamedTuple):
    """Where the parts lie."""

    unet: Path
    """`config.json` and the weights."""
    scheduler: Path
    """`scheduler_config.json`."""
    card: Path
    """`README.md`, which may be missing."""


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder says that diffusers wrote it."""
    if (path / "model_index.json").is_file():
        return True
    try:
        return "_class_name" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False  # no configuration, or one that whoever reads it will complain of


def read_diffusers_folder(path: Path, field: str = "source") -> Checkpoint:
    """The network of a diffusers folder.

    UserError, naming `field`, the file, the value and what is allowed, if a part is missing or not supported.
    """
    folder = find_parts(path, field)
    config, scheduler = _read_json(folder.unet / "config.json", field), _read_json(folder.scheduler, field)
    _check_class(config, ("UNet2DModel",), folder.unet / "config.json", field)
    _check_class(scheduler, SCHEDULERS, folder.scheduler, field)
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{field}: {folder.scheduler}: rescale_betas_zero_snr: true is not supported (its last noise level is "
            "infinite); allowed: false"
        )
    try:
        network = {
            "model_type": "UNet2DModel",
            "unet": complete_arguments({k: v for k, v in config.items() if not k.startswith("_")}),
            "schedule": Schedule.model_validate(
                {k: v for k, v in scheduler.items() if k in Schedule.model_fields}
            ).model_dump(mode="json"),
        }
    except ValidationError as error:
        where = folder.scheduler if error.title == Schedule.__name__ else folder.unet / "config.json"
        raise UserError("\n".join(f"{field}: {where}: {_explain(e)}" for e in error.errors())) from error
    except UserError:
        raise
    except Exception as error:  # values of a wrong type can fail anywhere in diffusers
        raise UserError(f"{field}: {folder.unet / 'config.json'} cannot be built by diffusers: {error}") from error
    return Checkpoint(network, read_weights(folder.unet, field), licence=read_licence(folder.card))


def diffusers_digest(path: Path) -> str:
    """Hex sha256 over the digests of what makes the network: configuration, schedule and weights."""
    folder = find_parts(path, "source")
    files = (folder.unet / "config.json", folder.scheduler, folder.unet / WEIGHTS)
    return hashlib.sha256("\n".join(digest(file) for file in files).encode()).hexdigest()


def find_parts(path: Path, field: str) -> Folder:
    """Where the parts of a pipeline's folder, or of a UNet's own folder, lie. UserError if one is missing."""
    index = path / "model_index.json"
    if index.is_file():
        _check_pipeline(_read_json(index, field), index, field)
    unet = path / "unet" if (path / "unet").is_dir() else path
    if not (unet / "config.json").is_file():
        raise UserError(f"{field}: {path} has no UNet: unet/config.json (or config.json beside it) is missing")
    wanted = [p / "scheduler_config.json" for p in (path / "scheduler", path, path.parent / "scheduler")]
    scheduler = next((p for p in wanted if p.is_file()), None)
    if scheduler is None:
        raise UserError(
            f"{field}: {path} has no noise schedule: scheduler_config.json is missing; allowed places: beside "
            "config.json, in scheduler/, in ../scheduler/ (in short: give the whole pipeline's folder)"
        )
    if not (unet / WEIGHTS).is_file():
        found = f"; {PICKLED} is a pickle, which is never loaded" if (unet / PICKLED).is_file() else ""
        raise UserError(
            f"{field}: {unet} has no {WEIGHTS}{found}; where you trust the file, save it again with diffusers: "
            "UNet2DModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    root = path.parent if scheduler == wanted[2] else path
    return Folder(unet, scheduler, root / "README.md")


def complete_arguments(unet: dict[str, Any]) -> dict[str, Any]:
    """Arguments of UNet2DModel with its defaults filled in, as JSON knows them.

    Raises pydantic's ValidationError for what is not supported, TypeError or ValueError for what diffusers refuses.
    """
    UNetArguments.model_validate(unet)
    with torch.device("meta"):
        config = import_diffusers().UNet2DModel(**unet).config
    arguments: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    return arguments


def read_weights(unet: Path, field: str) -> dict[str, torch.Tensor]:
    """The weights as float32, by today's names with the denoiser's prefix. UserError if the file is broken."""
    try:
        state = load_file(unet / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field}: {unet / WEIGHTS} cannot be read: {error}") from error
    old = re.compile(rf"\.({'|'.join(ATTENTION)})\.(weight|bias)$")
    return {
        "model." + old.sub(lambda m: f".{ATTENTION[m[1]]}.{m[2]}", name): tensor.float()
        for name, tensor in state.items()
    }


def read_licence(card: Path) -> str | None:
    """`license:` of a model card's front matter; None if there is none."""
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        fields = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    licence = fields.get("license") if isinstance(fields, dict) else None
    return licence if isinstance(licence, str) else None


def _check_pipeline(index: dict[str, Any], file: Path, field: str) -> None:
    _check_class(index, PIPELINES, file, field)
    for name in index:
        if not name.startswith("_") and name not in ("unet", "scheduler"):
            raise UserError(
                f"{field}: {file}: component {name!r} is not supported; allowed: unet and scheduler, i.e. a diffusion "
                "of the images themselves"
            )


def _check_class(config: dict[str, Any], allowed: tuple[str, ...], file: Path, field: str) -> None:
    if (found := config.get("_class_name")) not in allowed:
        raise UserError(f"{field}: {file}: _class_name: {found!r} is not supported; allowed: {', '.join(allowed)}")


def _read_json(file: Path, field: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{field}: {file} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{field}: {file} holds a {type(content).__name__}, not fields")
    return content


def _explain(error: Any) -> str:
    """One of pydantic's validation errors as "field: value is not supported; what is allowed"."""
    name = ".".join(part for part in map(str, error["loc"]) if part.isalnum() or part.isidentifier())
    message = error["msg"].removeprefix("Value error, ")
    if not name:  # a check over several fields names them itself
        return message
    return f"{name}: {error['input']!r} is not supported; {message[0].lower()}{message[1:]}"
