"""What the driver's terminal shows: a bar on a terminal, plain lines elsewhere, a summary at the end."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from sid_ray.config import Config
from sid_ray.teachers.untrained import WARNING
from sid_ray.training.evaluator import mean_and_deviation
from sid_ray.training.outside import duration, progress_line
from sid_ray.training.progress import Progress as Counters
from sid_ray.training.run_directory import RunDirectory


class Display:
    """Live progress of a run. `quiet` shows nothing."""

    def __init__(self, total_kimg: float, quiet: bool = False):
        self.quiet = quiet
        self.bar: Progress | None = None
        if sys.stdout.isatty() and not quiet:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}")
            self.bar = Progress(*columns)
            self.task = self.bar.add_task("distilling", total=total_kimg, line="starting workers")
            self.bar.start()

    def note(self, text: str) -> None:
        """Say something beside the progress."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            print(text, flush=True)

    def update(self, report: dict[str, Any]) -> None:
        """Show a report."""
        if self.bar:
            self.bar.update(self.task, completed=report["kimg"], line=progress_line(report).strip())
        elif not self.quiet:
            print(progress_line(report), flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar:
            self.bar.stop()


def cautions(config: Config) -> list[str]:
    """What a person must know of a run that cannot be trusted or watched as usual."""
    found = [WARNING] if config.teacher.random else []
    if not config.evaluation.num_images:
        found.append(
            "FID IS NOT MEASURED (evaluation.num_images 0): nothing tells whether the run goes well, and the latest "
            "average is kept, not the best"
        )
    return found


def print_summary(run: RunDirectory, p: Counters, config: Config) -> None:
    """Initial, final and best FID, the teacher's, where everything is, and what to try next."""
    total_kimg = config.run.total_kimg
    finished = p.nimg >= config.total_nimg
    table = Table(title=f"{run.path.name}: {p.nimg / 1000:g} of {total_kimg:g} kimg", show_header=False)
    rows = [("caution", text) for text in cautions(config)]
    if config.evaluation.num_images:
        rows += [
            ("FID before training", _number(p.initial_fid)),
            ("FID now", _number(p.fid)),
            ("best FID", f"{_number(p.best_fid)} at {(p.best_nimg or 0) / 1000:g} kimg"),
        ]
    if p.confirmed_fids:
        rows.append(("best again, fresh latents", mean_and_deviation(p.confirmed_fids)))
    if p.teacher_fid is not None:
        rows.append(("FID of the teacher", _number(p.teacher_fid)))
    honest = statistics.fmean(p.confirmed_fids) if p.confirmed_fids else p.best_fid
    if p.initial_fid and honest:
        rows.append(("improvement", f"{p.initial_fid / honest:.1f} times lower"))
    skipped = p.generator_skipped + p.fake_score_skipped
    rows += [("time in training steps", duration(p.seconds)), ("skipped steps", str(skipped))]
    if p.rollbacks:
        rows.append(("rollbacks", f"{p.rollbacks}, see {_shown(run, run.rollbacks)}"))
    rows += [
        ("generator", _shown(run, run.generator)),
        *(
            (name, _shown(run, path))
            for name, path in (("samples", run.samples), ("FID curve", run.fid_plot))
            if run.remote is not None or path.exists()
        ),
        ("TensorBoard", _shown(run, run.tensorboard)),
    ]
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    generator = _shown(run, run.generator)
    following = [
        f"sid-ray generate {generator} --num 100 --out grid.png",
        f"sid-ray evaluate {generator} --num 10000",
        f"sid-ray board {_shown(run, run.path)}",
    ]
    if finished:
        following.append(
            f"sid-ray distill ... --run.total_kimg {4 * total_kimg:g}   (the same command goes on from here)"
        )
    else:
        following.insert(0, "the same command again   (resumes)")
    console.print("Next:\n  " + "\n  ".join(following), markup=False)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _shown(run: RunDirectory, path: Path) -> str:
    """The path as the user would type it."""
    if run.remote is None and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return run.address(path)
