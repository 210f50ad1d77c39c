"""What a run tells: metrics.jsonl, TensorBoard, sample grids, the FID curve. Written by the first worker only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sid_ray.config import Config, fields
from sid_ray.evaluation.pictures import plot_fid, save_png
from sid_ray.teachers.model_directory import write_text
from sid_ray.training.run_directory import RunDirectory


class Board:
    """Writer of everything a person looks at. The x axis is always images.

    Opened at the image count where the run continues: what was told of later images, before the interruption,
    is taken back, so nothing is told twice.
    """

    def __init__(self, run: RunDirectory, config: Config, nimg: int):
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.config = run, config
        self.rows = [row for row in read_metrics(run.metrics) if nimg > 0 and row["nimg"] <= nimg]
        write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.writer = SummaryWriter(str(run.tensorboard), purge_step=nimg + 1 if nimg else 0)

    def scalars(self, nimg: int, values: dict[str, float]) -> None:
        """Record scalars, named like `loss/generator`, at an image count."""
        row = {"nimg": nimg, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self.rows.append(row)
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=nimg)
        self.writer.flush()

    def picture(self, nimg: int, grid: NDArray[np.uint8]) -> None:
        """Record a sample grid: a PNG and TensorBoard's slider."""
        save_png(self.run.samples / f"nimg-{nimg:012d}.png", grid)
        self.writer.add_image("samples", grid, global_step=nimg, dataformats="HWC")

    def fid_curve(self, teacher_fid: float | None) -> None:
        """Redraw fid.png."""
        points = [(row["nimg"], row["fid/generator"]) for row in self.rows if row.get("fid/generator") is not None]
        if points:
            nimg, fid = zip(*points, strict=True)
            plot_fid(
                self.run.fid_plot, nimg, fid, teacher_fid, f"{self.config.run.name}: FID of the one-step generator"
            )

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
        for summary in hparams(values, results):
            self.writer._get_file_writer().add_summary(summary)
        self.writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


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
