"""Images to files, in the form the file name asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.evaluation.fid import quantise
from sid_ray.evaluation.pictures import save_png, tile


def write_images(out: Path, images: Tensor, overwrite: bool = False) -> Path:
    """Write float images (N, C, H, W) in about [-1, 1] and return where.

    `.png`: one grid; `.npz`: uint8 `images` (N, H, W, C); without suffix: a folder of PNGs at their own size.
    UserError for another suffix, or if something is there and `overwrite` is not set.
    """
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out: {str(out)!r} is not allowed; allowed: a name ending in .png or .npz, or a folder")
    if out.exists() and not overwrite and (out.suffix or any(out.iterdir())):
        raise UserError(f"--out: {str(out)!r} exists already; choose another name, or add --overwrite")
    if out.suffix == ".png":
        save_png(out, tile(images, columns=min(len(images), round(len(images) ** 0.5) or 1)))
        return out
    pixels = quantise(images).permute(0, 2, 3, 1).cpu().numpy()
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out, images=pixels)
        return out
    for number, picture in enumerate(pixels):
        save_png(out / f"{number:06d}.png", picture)
    return out
