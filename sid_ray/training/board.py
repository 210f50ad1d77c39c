"""What a run tells: metrics.jsonl, TensorBoard, sample grids, the FID curve. Written by the first worker only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sid_ray.config import Config, fields
from sid_ray.evaluation.pictures import plot_fid, save_png
from sid_ray.teachers.model_directory import write_text
from sid_ray.training.rollback import Rollback
from sid_ray.training.run_directory import RunDirectory


class Board:
    """Writer of everything a person looks at. The x axis is always images.

    Opened at the image count where the run continues: what was told of later images, before the interruption,
    is taken back, so nothing is told twice. A stretch that a rollback abandoned stays to be seen: in metrics.jsonl
    before the row of the rollback, in TensorBoard as a curve of its own (what follows is `after-rollback-1`).
    """

    def __init__(self, run: RunDirectory, config: Config, nimg: int, rollbacks: Sequence[Rollback] = ()):
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.config = run, config
        rows = read_metrics(run.metrics)
        places = [i for i, row in enumerate(rows) if "rollback" in row]
        untold = rollbacks[len(places) :]
        if not untold:
            past = places[-1] + 1 if places else 0
            rows = rows[:past] + [row for row in rows[past:] if nimg > 0 and row["nimg"] <= nimg]
        self.rows = rows + [{"nimg": r.to_nimg, "rollback": r.number, "text": str(r)} for r in untold]
        write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        folder = run.tensorboard / f"after-rollback-{len(rollbacks)}" if rollbacks else run.tensorboard
        self.writer = SummaryWriter(str(folder), purge_step=nimg + 1 if nimg else 0)
        for rollback in untold:
            self.writer.add_text("guard/rollback", str(rollback), global_step=rollback.to_nimg)

    def scalars(self, nimg: int, values: dict[str, float]) -> None:
        """Record scalars, named like `loss/generator`, at an image count."""
        self._append({"nimg": nimg, **{k: v if math.isfinite(v) else None for k, v in values.items()}})
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=nimg)
        self.writer.flush()

    def event(self, nimg: int, event: str, text: str) -> None:
        """Record in words what the guard noticed."""
        self._append({"nimg": nimg, f"guard/{event}": text})
        self.writer.add_text(f"guard/{event}", text, global_step=nimg)
        self.writer.flush()

    def picture(self, nimg: int, grid: NDArray[np.uint8]) -> None:
        """Record a sample grid: a PNG and TensorBoard's slider."""
        save_png(self.run.samples / f"nimg-{nimg:012d}.png", grid)
        self.writer.add_image("samples", grid, global_step=nimg, dataformats="HWC")

    def fid_curve(self, teacher_fid: float | None) -> None:
        """Redraw fid.png."""
        line, abandoned = (_fids(rows) for rows in split_at_rollbacks(self.rows))
        if line:
            title = f"{self.config.run.name}: FID of the one-step generator"
            plot_fid(self.run.fid_plot, line, teacher_fid, title, abandoned)

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

    def _append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def split_at_rollbacks(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a metrics.jsonl as (those that led to where the run stands, those that rollbacks abandoned)."""
    line: list[dict[str, Any]] = []
    abandoned: list[dict[str, Any]] = []
    for row in rows:
        if "rollback" in row:
            abandoned += [r for r in line if r["nimg"] > row["nimg"]]
            line = [r for r in line if r["nimg"] <= row["nimg"]]
        else:
            line.append(row)
    return line, abandoned


def _fids(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["nimg"], row["fid/generator"]) for row in rows if row.get("fid/generator") is not None]


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
