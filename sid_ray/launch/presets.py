"""What a person is told of the presets. Needs no torch."""

from __future__ import annotations

import sys
import textwrap

from rich.console import Console
from rich.table import Table

from sid_ray.config import Config, load_config, preset_names
from sid_ray.teachers.public import EDM, EDM_LICENCE, PublicTeacher, public_teacher

COLUMNS = (
    *("preset", "teacher", "teacher FID", "SiD FID", "alpha", "batch", "parameters"),
    *("GFLOP forward", "GFLOP trained", "Mimg", "PFLOP"),
)
WIDTH = 144
"""Of the table where no terminal says otherwise."""
NOTES = f"""\
FID            as published (EDM, arXiv 2206.00364; SiD, arXiv 2404.04057), of 50,000 images. NFE: network evaluations
               of the teacher's sampler; a SiD generator needs one.
GFLOP forward  of one image through the network, counted, additions and multiplications as one each.
GFLOP trained  of one image in one iteration; times the images of the run (Mimg, million) this is the run's PFLOP.
teacher        builtin: comes with sid-ray. The others lie at {EDM}pretrained/ and are
               fetched at the start of a run, once per machine. They are under {EDM_LICENCE}.

sid-ray presets show NAME         one preset: sources, licence, published figures, every setting; a YAML to start from
sid-ray distill NAME --dry-run    what a run of it needs; starts nothing, fetches nothing
sid-ray distill NAME              the run
"""


def print_presets() -> None:
    """The presets in a table, and what its columns mean."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right", no_wrap=column in COLUMNS[:2])
    for name in preset_names():
        table.add_row(name, *_row(load_config(name)))
    console.print(table)
    print(f"\n{NOTES}", end="")


def explain(config: Config) -> list[str]:
    """Lines about a preset: what it distils, from where, under which licence, and what was published."""
    lines = [config.description] if config.description else []
    if not (teacher := public_teacher(config.teacher.path)):
        return [*lines, f"Teacher: {config.teacher.path}"]
    lines += [
        f"Teacher: {teacher.address}",
        f"Reference statistics: {teacher.reference}",
        *textwrap.wrap(f"Licence of the teacher, and so of the generator: {teacher.licence}", 110),
        f"Network: {teacher.parameters:,} parameters, {teacher.gflop:.4g} GFLOP per forward pass of an image",
        f"Cost: {config.method.forwards} forward passes for each of {config.run.total_kimg / 1000:g} million images, "
        f"{_digits(_petaflop(config, teacher))} PFLOP",
    ]
    if teacher.fid_sid is not None:
        others = "".join(f", {name} {fid:g}" for name, fid in (teacher.fid_others or {}).items())
        lines.append(f"Published FID: teacher {teacher.fid_teacher}; in one step SiD {teacher.fid_sid:.3f}{others}")
    return lines


def _row(config: Config) -> list[str]:
    teacher = public_teacher(config.teacher.path)
    assert teacher is not None  # every preset's is in the catalogue; a test says so
    return [
        teacher.name.removesuffix(".pkl"),
        teacher.fid_teacher,
        "-" if teacher.fid_sid is None else f"{teacher.fid_sid:.3f}",
        f"{config.method.alpha:g}",
        str(config.batch.size),
        f"{_digits(teacher.parameters / 1e6)} M",
        _digits(teacher.gflop),
        _digits(teacher.gflop * config.method.forwards),
        f"{config.run.total_kimg / 1000:g}",
        _digits(_petaflop(config, teacher)),
    ]


def _petaflop(config: Config, teacher: PublicTeacher) -> float:
    return teacher.gflop * config.method.forwards * config.total_nimg / 1e6


def _digits(number: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{float(f'{number:.3g}'):,.10g}"
