"""Pictures that people look at: sample grids and the FID curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sid_ray.diffusion.generator import OneStepGenerator
from sid_ray.evaluation.fid import quantise

SMALLEST_SIDE = 48
"""Images smaller than this many pixels are enlarged, so that a person can see them."""
GAP, GREY = 2, 96
"""Border of each image in a grid: pixels, and their value."""


def tile(images: Tensor, columns: int) -> NDArray[np.uint8]:
    """Float images (N, C, H, W) in about [-1, 1] as one uint8 picture (rows H', columns W', C), row by row.

    Small images are enlarged, and a grey gap keeps neighbours apart.
    """
    return tile_pixels(quantise(images).cpu(), columns)


def tile_pixels(pixels: Tensor, columns: int) -> NDArray[np.uint8]:
    """`tile` of uint8 images (N, C, H, W) on the CPU."""
    zoom = -(-SMALLEST_SIDE // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    pixels = torch.nn.functional.pad(pixels, (GAP, GAP, GAP, GAP), value=GREY)
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), GREY)])
    n, c, h, w = pixels.shape
    grid = pixels.reshape(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2)
    return visible(grid.reshape(n // columns * h, columns * w, c).numpy())


def visible(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, C) with 1 or 3 channels: of other numbers the first three, or the first."""
    channels = picture.shape[-1]
    return picture if channels in (1, 3) else picture[..., : 3 if channels > 3 else 1]


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture (H, W, 1 or 3) as PNG, in one step."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(aside, format="PNG")
    aside.replace(path)


def sample_grid(generator: OneStepGenerator, num: int, seed: int = 0) -> tuple[Tensor, int]:
    """Images from fixed latents for a square grid, and its number of columns; with classes, a row is of one class."""
    columns = math.isqrt(max(num - 1, 0)) + 1
    rows = torch.arange(num) // columns
    labels = rows % generator.label_dim if generator.label_dim else None
    return generator.sample(num, seed=seed, class_labels=labels), columns


def plot_points(panels: dict[str, Tensor]) -> NDArray[np.uint8]:
    """Points (N, d, 1, 1) in panels side by side, by title, as a uint8 picture (H, W, 3).

    The first two coordinates; a histogram if there is only one. The axes are those of the last panel's points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    *_, last = panels.values()
    low, high = float(last.min()), float(last.max())
    margin = 0.1 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    rows = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
    for index, (axes, (title, points)) in enumerate(zip(rows[0], panels.items(), strict=True)):
        flat = points.flatten(1).numpy()
        if flat.shape[1] == 1:
            axes.hist(flat[:, 0], bins=60, range=limits, color=f"C{index}")
        else:
            axes.scatter(flat[:, 0], flat[:, 1], s=3, color=f"C{index}")
            axes.set(ylim=limits, aspect="equal")
        axes.set(title=title, xlim=limits)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def plot_fid(
    path: Path,
    curve: Sequence[tuple[int, float]],
    teacher_fid: float | None,
    title: str,
    abandoned: Sequence[tuple[int, float]] = (),
) -> None:
    """FID against images, both logarithmic, with the teacher's FID as a line.

    `curve`: (images, FID) in order. `abandoned`: the same of stretches that were rolled back, shown as crosses.
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        points = [(n / 1000, f) for n, f in curve if n > 0]
        axes.loglog([n for n, _ in points], [f for _, f in points], "o-", ms=4, label="one-step generator (EMA)")
        if abandoned:
            crosses = [n / 1000 for n, _ in abandoned], [f for _, f in abandoned]
            axes.loglog(*crosses, "x", color="grey", label="rolled back")
        start = [f for n, f in curve if n == 0]
        if start:
            axes.axhline(start[0], color="grey", linestyle=":", label=f"before training: {start[0]:.3g}")
        if teacher_fid is not None:
            axes.axhline(teacher_fid, color="tab:red", linestyle="--", label=f"teacher, many steps: {teacher_fid:.3g}")
        axes.set(xlabel="thousands of images", ylabel="FID", title=title)
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()

    draw(path, 7, 4.5, paint)


def draw(path: Path, width: float, height: float, paint: Callable[[Any], None]) -> None:
    """Write a plot as PNG, in one step; `paint` gets the matplotlib figure, of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=120, format="png")
    aside.replace(path)


def plain_log(axis: Any) -> None:
    """Few short numbers on a logarithmic axis of matplotlib's, on which something has been drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
