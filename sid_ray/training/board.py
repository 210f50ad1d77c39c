"""What a run tells: metrics.jsonl, TensorBoard, sample grids, the FID curve. Written by the first worker only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sid_ray.config import Config, fields
from sid_ray.evaluation.pictures import plot_fid, save_png
from sid_ray.teachers.model_directory import write_text
from sid_ray.training.best_effort import BestEffort
from sid_ray.training.run_directory import RunDirectory


class Board:
    """Writer of everything a person looks at. The x axis is always images.

    Opened at the image count where the run continues: what was told of later images, before the interruption,
    is taken back, so nothing is told twice. What cannot be written (a full disk) is kept, and written with what
    comes next; pictures are not.
    """

    def __init__(self, run: RunDirectory, config: Config, nimg: int, attempt: BestEffort):
        self.run, self.config, self.attempt = run, config, attempt
        self.rows = [row for row in read_metrics(run.metrics) if nimg > 0 and row["nimg"] <= nimg]
        self.rows_in_file: int | None = None
        self.untold: list[tuple[int, dict[str, float]]] = []
        self.writer: Any = None
        self.purge_step = nimg + 1 if nimg else 0
        attempt("metrics.jsonl", self._write_rows)

    def scalars(self, nimg: int, values: dict[str, float]) -> None:
        """Record scalars, named like `loss/generator`, at an image count."""
        self.rows.append({"nimg": nimg, **{k: v if math.isfinite(v) else None for k, v in values.items()}})
        self.untold.append((nimg, values))
        self.attempt("metrics.jsonl", self._write_rows)
        self.attempt("tensorboard", self._tell)

    def picture(self, nimg: int, grid: NDArray[np.uint8]) -> None:
        """Record a sample grid: a PNG and TensorBoard's slider."""
        self.attempt("samples", lambda: save_png(self.run.samples / f"nimg-{nimg:012d}.png", grid))
        self.attempt("tensorboard", lambda: self._tell(lambda w: w.add_image("samples", grid, nimg, dataformats="HWC")))

    def fid_curve(self, teacher_fid: float | None) -> None:
        """Redraw fid.png."""
        points = [(row["nimg"], row["fid/generator"]) for row in self.rows if row.get("fid/generator") is not None]
        if points:
            nimg, fid = zip(*points, strict=True)
            title = f"{self.config.run.name}: FID of the one-step generator"
            self.attempt("fid.png", lambda: plot_fid(self.run.fid_plot, nimg, fid, teacher_fid, title))

    def hyper_parameters(self, results: dict[str, float]) -> None:
        """Fill TensorBoard's HParams tab."""
        from torch.utils.tensorboard.summary import hparams

        tree = self.config.model_dump()
        shown = ("method.", "optimizer.", "engine.", "batch.", "run.seed")
        values: dict[str, Any] = {}
        for name, _ in fields():
            if name.startswith(shown):
                section, _, field = name.partition(".")
                value = tree[section][field]
                values[name] = "default" if value is None else str(value) if isinstance(value, list) else value

        def add(writer: Any) -> None:
            for summary in hparams(values, results):
                writer._get_file_writer().add_summary(summary)

        self.attempt("tensorboard", lambda: self._tell(add))

    def close(self) -> None:
        """Flush and close the event file."""
        if self.writer is not None:
            self.attempt("tensorboard", self.writer.close)

    def _write_rows(self) -> None:
        """Append what the file lacks; after a failure, which may have left half a line, write it anew."""
        known, self.rows_in_file = self.rows_in_file, None
        if known is None:
            write_text(self.run.metrics, _lines(self.rows))
        else:
            with self.run.metrics.open("a", encoding="utf-8") as file:
                file.write(_lines(self.rows[known:]))
        self.rows_in_file = len(self.rows)

    def _tell(self, also: Callable[[Any], None] = lambda writer: None) -> None:
        """Give TensorBoard what it was not told yet. A writer that fails is beyond repair: a new one follows."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.run.tensorboard), purge_step=self.purge_step)
        try:
            for nimg, values in self.untold:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, global_step=nimg)
            also(self.writer)
            self.writer.flush()
        except OSError:
            with suppress(OSError):
                self.writer.close()
            self.writer = None
            self.purge_step = min([nimg for nimg, _ in self.untold], default=self.rows[-1]["nimg"] + 1)
            raise
        self.untold.clear()


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
