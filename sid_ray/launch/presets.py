"""What a person is told of the presets. Needs no torch."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.table import Table

from sid_ray.config import Config, load_config, preset_names
from sid_ray.teachers.public import EDM, EDM_LICENCE, PublicTeacher, public_teacher

COLUMNS = ("preset", "teacher FID", "SiD FID", "params", "GFLOP forward", "GFLOP trained", "Mimg", "PFLOP")
NOTES = f"""\
FID            published (EDM, arXiv 2206.00364; SiD, arXiv 2404.04057), 50,000
               images; the teacher needs many network evaluations, SiD one.
GFLOP forward  of one image through the network, counted; additions and
               multiplications are one each.
GFLOP trained  of one image in one iteration; times the images of a run (Mimg,
               million) this is its PFLOP.
Teachers       are fetched at the start of a run, once per machine, from
               {EDM}pretrained/
               under {EDM_LICENCE}. The digits come with sid-ray.

sid-ray presets show NAME        sources, licence, figures and every setting of
                                 one preset: a YAML file to start from
sid-ray distill NAME --dry-run   what a run needs; starts and fetches nothing
sid-ray distill NAME             the run
"""


def print_presets() -> None:
    """The presets: what they distil, and a table of their figures with what its columns mean."""
    configs = {name: load_config(name) for name in preset_names()}
    about, figures = Table.grid(padding=(0, 2)), Table(box=None, padding=(0, 1), pad_edge=False)
    for index, column in enumerate(COLUMNS):
        figures.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for name, config in configs.items():
        about.add_row(name, f"{config.description}\nteacher: {config.teacher.path.rsplit('/', 1)[-1]}")
        figures.add_row(name, *_figures(config))
    console = Console(highlight=False)
    console.print(about)
    print()
    console.print(figures)
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
        many = ", ".join(f"{fid:.2f} in {nfe} evaluations" for nfe, fid in teacher.fid_teacher.items())
        others = "".join(f", {name} {fid:g}" for name, fid in teacher.fid_others.items())
        lines.append(f"Published FID: teacher {many}; in one, SiD {teacher.fid_sid:.3f}{others}")
    return lines


def _figures(config: Config) -> list[str]:
    teacher = public_teacher(config.teacher.path)
    assert teacher is not None  # every preset's is in the catalogue; a test says so
    return [
        next((f"{fid:.2f}" for fid in teacher.fid_teacher.values()), "-"),
        "-" if teacher.fid_sid is None else f"{teacher.fid_sid:.3f}",
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
