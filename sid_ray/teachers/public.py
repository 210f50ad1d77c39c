"""Teachers that the presets distil: architecture, cost, where they come from, what was published about them.

Plain data, without torch: `sid-ray presets` reads it at once, and a dry run knows a network that is not there yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/"
"""Where the authors of EDM (Karras et al. 2022, arXiv 2206.00364) keep checkpoints and reference statistics."""
EDM_LICENCE = "CC BY-NC-SA 4.0"
"""Of EDM's checkpoints, and so of what is distilled from them: no commercial use."""

DDPMPP = {
    "img_channels": 3,
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
    "augment_dim": 9,
}
"""What EDM's DDPM++ networks have in common."""


@dataclass(frozen=True)
class PublicTeacher:
    """A teacher that anyone can have."""

    name: str
    """File name, or `builtin:...`: the last part of every path to it."""
    network: dict[str, Any]
    """Arguments of `EDMDenoiser`."""
    parameters: int
    """Number of trainable numbers."""
    gflop: float
    """Cost of one forward pass of one image in 10^9 additions and multiplications, as `network_cost` counts them."""
    address: str
    """Where to get it; `teacher.path` takes this."""
    reference: str
    """Where to get the reference statistics of its data; `evaluation.reference` takes this."""
    licence: str
    """Licence of the weights."""
    steps: int
    """Heun steps of the sampler that it is measured with: 2 steps - 1 network evaluations (NFE)."""
    fid_teacher: Mapping[int, float] = field(default_factory=dict)
    """Published FIDs of the teacher by network evaluations (NFE); the best of ImageNet's used a stochastic sampler."""
    fid_sid: float | None = None
    """Published FID of the one-step generator that SiD made from it (arXiv 2404.04057), mean of 10 trials."""
    fid_others: Mapping[str, float] = field(default_factory=dict)
    """Published FIDs of other one-step generators of the same data."""


def _edm(file: str, reference: str, **fields: Any) -> PublicTeacher:
    return PublicTeacher(
        name=f"{file}.pkl",
        address=f"{EDM}pretrained/{file}.pkl",
        reference=f"{EDM}fid-refs/{reference}.npz",
        licence=EDM_LICENCE,
        **fields,
    )


def _digits() -> PublicTeacher:
    config = json.loads((Path(__file__).parent.parent / "assets" / "digits" / "config.json").read_text("utf-8"))
    return PublicTeacher(
        name="builtin:digits",
        network=config["network"],
        parameters=260_497,
        gflop=0.012667,
        address="builtin:digits",
        reference="builtin:digits",
        licence=config["licence"],
        steps=18,
    )


PUBLIC = {
    teacher.name: teacher
    for teacher in (
        _digits(),
        _edm(
            "edm-cifar10-32x32-uncond-vp",
            "cifar10-32x32",
            network=DDPMPP | {"img_resolution": 32, "label_dim": 0, "channel_mult": [2, 2, 2], "dropout": 0.13},
            parameters=55_733_891,
            gflop=42.380430,
            steps=18,
            fid_teacher={35: 1.97},
            fid_sid=1.923,
            fid_others={"SiDA": 1.499, "Diff-Instruct": 4.53, "DMD": 3.77},
        ),
        _edm(
            "edm-cifar10-32x32-cond-vp",
            "cifar10-32x32",
            network=DDPMPP | {"img_resolution": 32, "label_dim": 10, "channel_mult": [2, 2, 2], "dropout": 0.13},
            parameters=55_735_299,
            gflop=42.380432,
            steps=18,
            fid_teacher={35: 1.79},
            fid_sid=1.710,
            fid_others={"SiDA": 1.396},
        ),
        _edm(
            "edm-imagenet-64x64-cond-adm",
            "imagenet-64x64",
            network={
                "img_resolution": 64,
                "img_channels": 3,
                "label_dim": 1000,
                "model_type": "DhariwalUNet",
                "model_channels": 192,
                "channel_mult": [1, 2, 3, 4],
            },
            parameters=295_899_267,
            gflop=219.315106,
            steps=40,
            fid_teacher={79: 2.64, 511: 1.36},
            fid_sid=1.524,
            fid_others={"SiDA": 1.110, "Diff-Instruct": 5.57, "DMD": 2.62},
        ),
        _edm(
            "edm-ffhq-64x64-uncond-vp",
            "ffhq-64x64",
            network=DDPMPP | {"img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
            parameters=61_805_571,
            gflop=83.722898,
            steps=40,
            fid_teacher={79: 2.39},
            fid_sid=1.550,
            fid_others={"SiDA": 1.040},
        ),
        _edm(
            "edm-afhqv2-64x64-uncond-vp",
            "afhqv2-64x64",
            network=DDPMPP | {"img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
            parameters=61_805_571,
            gflop=83.722898,
            steps=40,
            fid_teacher={79: 1.96},
            fid_sid=1.628,
            fid_others={"SiDA": 1.276},
        ),
    )
}
"""By name."""


def public_teacher(path: str) -> PublicTeacher | None:
    """The public teacher that a path or address names, wherever it lies; None for any other."""
    return PUBLIC.get(path.rsplit("/", 1)[-1])
