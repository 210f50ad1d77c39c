"""A generator for others: its model directory with a picture of samples, out of the run that made it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from torch import nn

from sid_ray.errors import UserError
from sid_ray.evaluation.pictures import plot_points, sample_grid, save_png, tile
from sid_ray.storage import is_remote
from sid_ray.storage.mirror import push
from sid_ray.storage.s3 import S3Folder, StorageError
from sid_ray.teachers.sources import find_source, load_generator

FILES = ("model.safetensors", "README.md", "config.json")
"""A model directory; the configuration, which makes it whole, last."""
SAMPLES, POINTS = 100, 1000


def export_generator(run: str, to: str, network: nn.Module | None = None) -> str:
    """Copy the generator of a run (or a generator's model directory) to a new folder or an `s3://` address.

    Beside weights, configuration and model card it gets `samples.png`. Nothing of the run but these leaves it.
    `network`: needed if the generator is code of the user's own. Returns `to`. UserError if there is no generator, or
    something is there already.
    """
    source = generator_address(run)
    if is_remote(to) and not to.startswith("s3://"):
        raise UserError(f"--to: {to!r} is not allowed; allowed: a folder that is not there yet, or s3://bucket/prefix")
    try:
        if S3Folder(to.rstrip("/")).objects() if is_remote(to) else Path(to).exists():
            raise UserError(f"--to: {to!r} exists already; choose another place")
        generator = load_generator(source, network)
        folder = find_source(source, "run").path
        with tempfile.TemporaryDirectory() as scratch:
            aside = Path(scratch) / "generator"
            aside.mkdir()
            for name in FILES:
                shutil.copyfile(folder / name, aside / name)
            if generator.denoiser.image_shape[1:] == (1, 1):
                picture = plot_points({"one step": generator.sample(POINTS)})
            else:
                picture = tile(*sample_grid(generator, SAMPLES))
            save_png(aside / "samples.png", picture)
            if is_remote(to):
                push(aside, S3Folder(to.rstrip("/")))
            else:
                shutil.copytree(aside, to)
    except (OSError, StorageError) as error:
        raise UserError(f"--to: {to!r} cannot be written: {error}") from error
    return to


def generator_address(run: str) -> str:
    """Where the generator of a run lies; `run` may be the generator itself. UserError if there is none."""
    inner = f"{run.rstrip('/')}/generator"
    if not is_remote(run):
        return inner if (Path(inner) / "config.json").is_file() else run
    try:
        find_source(inner, "run")
    except UserError:
        return run
    return inner
