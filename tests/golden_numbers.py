"""Reader for the golden numbers of the reference implementation (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sid_ray.diffusion.denoiser import EDMDenoiser

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = ["ddpmpp_uncond", "ddpmpp_cond", "ncsnpp_uncond", "adm_cond"]
TRAJECTORIES = ["uncond_alpha1.0", "cond_alpha1.2", "uncond_alpha1.2_gbeta0.9"]


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and decoded metadata of `tests/golden/<name>.safetensors`."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        raw = file.metadata()
    return tensors, {key: json.loads(value) for key, value in raw.items()}


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose name starts with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def golden_denoiser(tensors: dict[str, torch.Tensor], init_kwargs: dict[str, Any], prefix: str) -> EDMDenoiser:
    denoiser = EDMDenoiser(**init_kwargs)
    denoiser.load_state_dict(under(tensors, prefix), strict=True)
    return denoiser
