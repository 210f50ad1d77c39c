"""`sid-ray evaluate`, `stats` and `generate`: bars on a terminal, tables, and what is written."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sid_ray.errors import UserError
from sid_ray.evaluation.export_images import SampledImages, check_out, write_images
from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.image_files import open_images
from sid_ray.evaluation.measure import Setup, measure_seeds
from sid_ray.evaluation.parts import cut, in_order, local_device
from sid_ray.evaluation.reference_images import reference_statistics
from sid_ray.evaluation.statistics import ReferenceStatistics, save_reference
from sid_ray.launch.parallel import map_parts
from sid_ray.teachers.model_directory import absolute
from sid_ray.teachers.modules import named_network
from sid_ray.teachers.sources import load_generator
from sid_ray.training.teach import library_versions

Trial = dict[str, float]


@contextmanager
def counting_images(total: int) -> Iterator[Any]:
    """A bar that counts images, on a terminal; yields what to call with each batch's number of images."""
    columns = TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)


def measure_trials(setup: Setup, num: int, seeds: range, batch: int, workers: str = "auto") -> list[Trial]:
    """Measure a model once per seed, on all workers, and print a table with mean and deviation."""
    with counting_images(num * len(seeds)) as count:
        results = map_parts(setup.work, cut(seeds, num, batch), workers)
        measured = dict(measure_seeds(results, setup, num, count))
    trials = [measured[seed] for seed in seeds]
    table = Table(title=f"{num} images per trial, features: {setup.features.name}")
    for heading in ("seed", *trials[0]):
        table.add_column(heading, no_wrap=True)
    for seed, values in zip(seeds, trials, strict=True):
        table.add_row(str(seed), *(f"{v:.4f}" for v in values.values()))
    if len(trials) > 1:
        columns = [[trial[name] for trial in trials] for name in trials[0]]
        table.add_section()
        table.add_row("mean", *(f"{statistics.fmean(column):.4f}" for column in columns))
        table.add_row("±", *(f"{statistics.stdev(column):.4f}" for column in columns))
    Console(highlight=False, soft_wrap=True).print(table)
    return trials


def check_new(field: str, file: Path | None, overwrite: bool = False) -> None:
    """UserError if the file is there already, or its folder is not."""
    if file is None:
        return
    if file.exists() and not overwrite:
        raise UserError(f"{field}: {str(file)!r} exists already; choose another name")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{field}: {str(file.parent)!r} is not a folder")


def write_trials(file: Path, setup: Setup, reference: str, num: int, seeds: Sequence[int], trials: list[Trial]) -> None:
    """The measurement as JSON, with all that it depends on. What is not finite is null."""
    document = {
        "model": setup.work.model,
        "steps": setup.work.steps,
        "num": num,
        "features": setup.features.name,
        "reference": reference,
        "reference_num": setup.reference.num,
        "trials": [
            {"seed": seed} | {k: v if math.isfinite(v) else None for k, v in values.items()}
            for seed, values in zip(seeds, trials, strict=True)
        ],
        "versions": library_versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def make_reference(
    images: str, out: Path, features: str, detector: str, sample: int, seed: int, batch: int, overwrite: bool
) -> ReferenceStatistics:
    """Reference statistics of images at a path or an address, written to `out`; on the GPU if there is one."""
    if out.suffix != ".npz":
        raise UserError(f"--out: {str(out)!r} is not allowed; allowed: a name ending in .npz")
    check_new("--out", out, overwrite)
    found = open_images(images)
    network = load_features(features, found.shape, detector).to(local_device())
    with counting_images(found.num) as count:
        reference = reference_statistics(
            found.batches(batch),
            found.num,
            network,
            sample=sample,
            seed=seed,
            device=local_device(),
            progress=count,
        )
    save_reference(out, reference)
    return reference


def generate_images(
    model: str,
    num: int,
    out: Path,
    seed: int,
    labels: list[int] | None,
    batch: int,
    workers: str,
    overwrite: bool,
    network: str | None = None,
) -> Path:
    """Write `num` images of a one-step generator, the classes taken in turn from `labels`; returns where."""
    check_out(out, overwrite)
    generator = load_generator(model, named_network(network))
    classes = tuple(labels[i % len(labels)] for i in range(num)) if labels else None
    try:
        generator.check_labels(num, None if classes is None else list(classes))
    except ValueError as error:
        raise UserError(f"--label: {error}") from error
    parts, work = cut([seed], num, batch), SampledImages(absolute(model), classes, network)
    with counting_images(num) as count:

        def counted() -> Iterator[Any]:
            for images in in_order(parts, map_parts(work, parts, workers)):
                count(len(images))
                yield images

        return write_images(out, counted(), num, overwrite)
