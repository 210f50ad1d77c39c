"""Generated images, and files of them in the form that the file name asks for."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.evaluation.fid import quantise
from sid_ray.evaluation.parts import Part
from sid_ray.evaluation.pictures import plot_points, save_png, tile_pixels, visible
from sid_ray.teachers.modules import named_network
from sid_ray.teachers.sources import load_generator

ARRAY = "images.npy"
"""The one array of an .npz of images."""


@dataclass(frozen=True)
class SampledImages:
    """Images of a one-step generator: the work of generating, a part at a time (`parts.Work`)."""

    model: str
    classes: tuple[int, ...] | None
    """Class index of every image; None draws them."""
    network: str | None = None
    """`python:package.module:factory` of the generator's network, if that is the user's own code."""

    def load(self, device: torch.device) -> Callable[[Part], Tensor]:
        """Function from a part to its uint8 images (n, C, H, W), on the CPU."""
        generator = load_generator(self.model, named_network(self.network)).to(device)
        labels = None if self.classes is None else torch.tensor(self.classes)

        def run(part: Part) -> Tensor:
            chosen = None if labels is None else labels[part.numbers.start : part.numbers.stop]
            return quantise(generator.sample_numbers(part.numbers, part.seed, chosen)).cpu()

        return run


def check_out(out: Path, overwrite: bool = False) -> None:
    """UserError unless `out` ends in .png or .npz, or is a folder's name, and nothing there would be lost."""
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out: {str(out)!r} is not allowed; allowed: a name ending in .png or .npz, or a folder")
    if out.exists() and not overwrite and (out.suffix or any(out.iterdir())):
        raise UserError(f"--out: {str(out)!r} exists already; choose another name, or add --overwrite")


def write_images(out: Path, batches: Iterable[Tensor], num: int, overwrite: bool = False) -> Path:
    """Write `num` uint8 images, given in batches (n, C, H, W), and return where.

    `.png`: one grid, or a plot of points; `.npz`: uint8 `images` (N, H, W, C); without suffix: a folder of PNGs at
    their own size. Only the grid needs all images in memory. UserError as in `check_out`.
    """
    check_out(out, overwrite)
    if out.suffix == ".png":
        images = torch.cat(list(batches))
        points = images.shape[2:] == (1, 1)
        grid = plot_points({"one step": images / 127.5 - 1}) if points else tile_pixels(images, round(num**0.5) or 1)
        save_png(out, grid)
        return out
    pictures = (batch.permute(0, 2, 3, 1).numpy() for batch in batches)
    if out.suffix == ".npz":
        _write_npz(out, pictures, num)
    else:
        for number, picture in enumerate(chain.from_iterable(pictures)):
            save_png(out / f"{number:06d}.png", visible(picture))
    return out


def _write_npz(out: Path, pictures: Iterator[np.ndarray], num: int) -> None:
    """What `np.savez_compressed(out, images=...)` writes, batch by batch."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}")
    with (
        zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(ARRAY, "w", force_zip64=True) as file,
    ):
        for position, batch in enumerate(pictures):
            if position == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (num, *batch.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(batch.tobytes())
    aside.replace(out)
