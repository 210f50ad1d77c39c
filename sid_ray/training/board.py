"""What a run tells: metrics.jsonl, TensorBoard, sample grids, the FID curve. Written by the first worker only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sid_ray.config import Config, fields
from sid_ray.evaluation.pictures import plot_fid, save_png
from sid_ray.teachers.model_directory import write_text
from sid_ray.training.best_effort import BestEffort
from sid_ray.training.rollback import Rollback
from sid_ray.training.run_directory import RunDirectory


class Board:
    """Writer of everything a person looks at. The x axis is always images.

    Opened at the image count where the run continues: what was told of later images, before the interruption,
    is taken back, so nothing is told twice. A stretch that a rollback abandoned stays to be seen: in metrics.jsonl
    before the row of the rollback, in TensorBoard as a curve of its own (what follows is `after-rollback-1`). What
    cannot be written (a full disk) is kept, and written with what comes next; pictures are not.
    """

    def __init__(
        self, run: RunDirectory, config: Config, nimg: int, attempt: BestEffort, rollbacks: Sequence[Rollback] = ()
    ):
        self.run, self.config, self.attempt = run, config, attempt
        rows = read_metrics(run.metrics)
        places = [i for i, row in enumerate(rows) if "rollback" in row]
        new = rollbacks[len(places) :]
        if not new:
            past = places[-1] + 1 if places else 0
            rows = rows[:past] + [row for row in rows[past:] if nimg > 0 and row["nimg"] <= nimg]
        self.rows = rows + [{"nimg": r.to_nimg, "rollback": r.number, "guard/rollback": str(r)} for r in new]
        self.rows_in_file: int | None = None
        self.untold: list[tuple[int, Mapping[str, float | str]]] = [
            (r.to_nimg, {"guard/rollback": str(r)}) for r in new
        ]
        self.folder = run.tensorboard / f"after-rollback-{len(rollbacks)}" if rollbacks else run.tensorboard
        self.writer: Any = None
        self.purge_step = nimg + 1 if nimg else 0
        attempt("metrics.jsonl", self._write_rows)

    def scalars(self, nimg: int, values: dict[str, float]) -> None:
        """Record scalars, named like `loss/generator`, at an image count."""
        self._record(nimg, {k: v if math.isfinite(v) else None for k, v in values.items()}, values)

    def fid(self, nimg: int, values: dict[str, float]) -> None:
        """Record an evaluation. One that was told before an interruption, and is measured again, is not told twice."""
        if not any(row["nimg"] == nimg and "fid/generator" in row for row in split_at_rollbacks(self.rows)[0]):
            self.scalars(nimg, values)

    def event(self, nimg: int, event: str, text: str) -> None:
        """Record in words what the guard noticed."""
        self._record(nimg, {f"guard/{event}": text}, {f"guard/{event}": text})

    def picture(self, nimg: int, grid: NDArray[np.uint8]) -> None:
        """Record a sample grid: a PNG and TensorBoard's slider."""
        self.attempt("samples", lambda: save_png(self.run.samples / f"nimg-{nimg:012d}.png", grid))
        self.attempt("tensorboard", lambda: self._tell(lambda w: w.add_image("samples", grid, nimg, dataformats="HWC")))

    def fid_curve(self, teacher_fid: float | None) -> None:
        """Redraw fid.png."""
        line, abandoned = (_fids(rows) for rows in split_at_rollbacks(self.rows))
        if line:
            title = f"{self.config.run.name}: FID of the one-step generator"
            self.attempt("fid.png", lambda: plot_fid(self.run.fid_plot, line, teacher_fid, title, abandoned))

    def hyper_parameters(self, results: dict[str, float]) -> None:
        """Fill TensorBoard's HParams tab."""
        self.attempt("tensorboard", lambda: self._tell(lambda w: add_hyper_parameters(w, self.config, results)))

    def close(self) -> None:
        """Flush and close the event file."""
        if self.writer is not None:
            self.attempt("tensorboard", self.writer.close)

    def _record(self, nimg: int, row: Mapping[str, float | str | None], values: Mapping[str, float | str]) -> None:
        self.rows.append({"nimg": nimg, **row})
        self.untold.append((nimg, values))
        self.attempt("metrics.jsonl", self._write_rows)
        self.attempt("tensorboard", self._tell)

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
            self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
        try:
            for nimg, values in self.untold:
                for name, value in values.items():
                    add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
                    add(name, value, global_step=nimg)
            also(self.writer)
            self.writer.flush()
        except OSError:
            with suppress(OSError):
                self.writer.close()
            self.writer = None
            self.purge_step = min([nimg for nimg, _ in self.untold], default=self.rows[-1]["nimg"] + 1)
            raise
        self.untold.clear()


def add_hyper_parameters(writer: Any, config: Config, results: Mapping[str, float]) -> None:
    """Give a SummaryWriter a run's settings and results, which fill TensorBoard's HParams tab."""
    from torch.utils.tensorboard.summary import hparams

    tree = config.model_dump()
    shown = ("method.", "optimizer.", "engine.", "batch.", "run.seed")
    values: dict[str, Any] = {}
    for name, _ in fields():
        if name.startswith(shown):
            section, _, field = name.partition(".")
            value = tree[section][field]
            values[name] = "default" if value is None else str(value) if isinstance(value, list) else value
    for summary in hparams(values, dict(results)):
        writer._get_file_writer().add_summary(summary)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


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
