"""Tiny folders as diffusers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
"""Arguments of a UNet2DModel of 8x8 grey images."""


def tiny_unet(**arguments: Any) -> Any:
    """A UNet2DModel with the same random weights every time."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**{**TINY, **arguments}).eval()


def write_pipeline(
    folder: Path,
    schedule: dict[str, Any] | None = None,
    card: str | None = None,
    safe_serialization: bool = True,
    **arguments: Any,
) -> Any:
    """Write a DDPMPipeline and return its UNet. `schedule`: arguments of DDPMScheduler, others of UNet2DModel."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = tiny_unet(**arguments)
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(**(schedule or {})))
    pipeline.save_pretrained(folder, safe_serialization=safe_serialization)
    if card is not None:
        (folder / "README.md").write_text(card)
    return unet
