"""The training loop: SiD's iteration, and after it whatever is due at this image count."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sid_ray.config import Config
from sid_ray.diffusion.generator import OneStepGenerator
from sid_ray.evaluation.pictures import plot_points, sample_grid, tile
from sid_ray.storage.mirror import Mirror
from sid_ray.teachers.model_directory import write_text
from sid_ray.training.best_effort import BestEffort
from sid_ray.training.board import Board
from sid_ray.training.checkpoints import clean_up, save_checkpoint
from sid_ray.training.distributed import World
from sid_ray.training.evaluations import Evaluations, Found
from sid_ray.training.evaluator import POINTS, Evaluator
from sid_ray.training.guard import Diverged, Notice, TrainingStopped, watch, watch_skips
from sid_ray.training.networks import Networks
from sid_ray.training.outside import Outside
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory
from sid_ray.training.schedules import crossed, ema_beta, evaluation_due, learning_rates
from sid_ray.training.step import Iteration, StepLosses
from sid_ray.training.stops import StopChecks
from sid_ray.training.watchdog import Watchdog


@dataclass
class Tick:
    """What has happened since the last report; losses stay on the device until then."""

    losses: list[StepLosses] = field(default_factory=list)
    images: int = 0
    started: float = field(default_factory=time.monotonic)


class BestToSave(NamedTuple):
    """A generator that is the best so far."""

    average: dict[str, Tensor]
    progress: Progress


@dataclass
class Loop:
    """One worker's training, from a restored state to the end or to a stop."""

    config: Config
    run: RunDirectory
    world: World
    networks: Networks
    iteration: Iteration
    evaluator: Evaluator
    evaluations: Evaluations
    progress: Progress
    outside: Outside
    attempt: BestEffort
    board: Board | None
    """Only on the first worker."""
    watchdog: Watchdog
    mirror: Mirror | None
    """Only on the first worker, and only if the run lies on S3."""
    best_to_save: BestToSave | None = None
    """The best average while it is not in `generator/` yet."""
    failed_checkpoints: int = 0
    """Checkpoints in a row that could not be written."""
    unreported: list[Found] = field(default_factory=list)
    """Evaluations that no report has told of yet."""

    def train(self) -> bool:
        """Train until `run.total_kimg` or until asked to stop; returns whether the end was reached.

        Both ways leave a checkpoint. Diverged, without one, if the guard says so.
        """
        if self.progress.nimg == 0:
            self._measure_start()
        self._take(self.evaluations.resume())
        total, tick, stop = self.config.total_nimg, Tick(), False
        stops = StopChecks(self.world, self.outside)
        while self.progress.nimg < total and not stop:
            before = self.progress.nimg
            with self.watchdog.watching():
                self._step(tick)
                stop = stops.stop()
            after, last = self.progress.nimg, self.progress.nimg >= total

            evaluate = last or evaluation_due(self.config.evaluation.every_kimg, before, after)
            sample = evaluate or crossed(self.config.run.sample_every_kimg, before, after)
            report = evaluate or crossed(self.config.run.report_every_kimg, before, after)
            better = False
            if report:
                with self.watchdog.watching():
                    metrics = self._tick_metrics(tick)
            if sample:
                average = self.networks.generator.average()
                if evaluate:
                    better = self._take(self.evaluations.evaluate(average, now=last))
                self._sample(average)
                self.world.barrier()  # for the first worker's writing; in the next step its peers would be watched
            if report:
                self._take(self.evaluations.arrived())
                with self.watchdog.watching():
                    self._report(metrics)
                tick = Tick()
            # Where an average may turn out to be the best after training has gone on, its checkpoint must be there.
            best = self.config.run.keep_best and (better or (evaluate and self.evaluations.beside))
            if last or stop or best or crossed(self.config.run.checkpoint_every_kimg, before, after):
                self._checkpoint(leaving=last or stop)
                tick.started = time.monotonic()
        return self.progress.nimg >= total

    def finish(self) -> None:
        """After the last image: measure the best generator again, with fresh latents."""
        p, e = self.progress, self.config.evaluation
        if e.num_images and e.confirmations and not p.confirmed_fids and p.best_fid is not None:
            p.confirmed_fids = self.evaluator.confirm_best(p)
        if self.board:
            results = {"result/best_fid": p.best_fid, "result/final_fid": p.fid, "result/teacher_fid": p.teacher_fid}
            self.board.hyper_parameters({k: v for k, v in results.items() if v is not None})
        if self.world.is_first:
            exclude = {"guard": {"ticks"}}
            write_text(self.run.summary, p.model_dump_json(indent=2, exclude=exclude) + "\n")

    def _step(self, tick: Tick) -> None:
        generator, fake_score = self.networks.generator, self.networks.fake_score
        skipped = generator.skipped, fake_score.skipped
        started = time.monotonic()
        tick.losses.append(self.iteration(self.progress.nimg))
        tick.images += self.config.batch.size
        self.progress.count_step(
            self.config.batch.size,
            generator_skipped=generator.skipped > skipped[0],
            fake_score_skipped=fake_score.skipped > skipped[1],
            seconds=time.monotonic() - started,
        )
        p = self.progress
        self._heed(watch_skips(p.skipped_in_a_row, p.nimg, self.config.batch.size, self.config.guard))

    def _tick_metrics(self, tick: Tick) -> dict[str, float]:
        """Scalars of the tick; the one place where the host waits for the device."""
        losses = torch.stack([torch.stack(losses) for losses in tick.losses]).mean(0)
        fake_score, generator = self.networks.fake_score.gradient_norm, self.networks.generator.gradient_norm
        norms = torch.tensor([fake_score, generator], device=self.world.device) / self.world.size
        # Summed together, all four are the same on every worker, and so is what the guard makes of them.
        fake_loss, generator_loss, fake_norm, generator_norm = self.world.sum(torch.cat([losses, norms])).tolist()
        seconds = time.monotonic() - tick.started
        o, p = self.config.optimizer, self.progress
        nimg = p.nimg - self.config.batch.size  # where the last step started
        generator_lr, fake_score_lr = learning_rates(self.config, nimg)
        return {
            "loss/fake_score": fake_loss,
            "loss/generator": generator_loss,
            "gradient_norm/fake_score": fake_norm,
            "gradient_norm/generator": generator_norm,
            "learning_rate/fake_score": fake_score_lr,
            "learning_rate/generator": generator_lr,
            "ema/beta": ema_beta(self.config.batch.size, nimg, o.ema_halflife_kimg, o.ema_rampup_ratio),
            "skipped/fake_score": float(p.fake_score_skipped),
            "skipped/generator": float(p.generator_skipped),
            "speed/images_per_second": tick.images / seconds,
        }

    def _report(self, metrics: dict[str, float]) -> None:
        """Tell of a tick and of the evaluations that have become known, and let the guard judge them."""
        p, rules = self.progress, self.config.guard
        notices, scalars = list[Notice](), dict[str, float]()
        found, self.unreported = self.unreported, []
        for evaluation in found:
            p.guard, new, told = watch(p.guard, evaluation.nimg, {}, evaluation.fid, rules)
            notices, scalars = notices + new, scalars | told
        p.guard, new, told = watch(p.guard, p.nimg, metrics, None, rules)
        notices, scalars = notices + new, scalars | told
        if self.world.is_first:
            self.attempt("the run's lease", self.run.check_owner)
            self.attempt("generator", self._save_best)
        if self.board and metrics:
            self.board.scalars(p.nimg, metrics | scalars | {"guard/rollbacks": float(p.rollbacks)})
        for new_evaluation in (*found,) or (None,):
            self._tell_outside(metrics, new_evaluation)
        self._heed(notices)

    def _heed(self, notices: list[Notice]) -> None:
        """Tell what the guard noticed; Diverged if that is a divergence and the policy is not only to warn."""
        p = self.progress
        for notice in notices:
            if self.board:
                self.board.event(p.nimg, notice.event, notice.text)
                self.outside.note(f"guard: {notice.text}")
        divergence = next((n for n in notices if n.event == "divergence"), None)
        if divergence is not None and self.config.guard.policy != "warn":
            raise Diverged(divergence, p.nimg, p.rollbacks, None if p.best_fid is None else p.best_nimg)

    def _tell_outside(self, metrics: dict[str, float], new: Found | None) -> None:
        p, speed = self.progress, metrics.get("speed/images_per_second", 0.0)
        remaining = (self.config.total_nimg - p.nimg) / speed if speed else 0.0
        figures: dict[str, Any] = {
            "nimg": p.nimg,
            "kimg": p.nimg / 1000,
            "total_kimg": self.config.run.total_kimg,
            "images_per_second": speed,
            "eta_seconds": remaining,
            "skipped": p.generator_skipped + p.fake_score_skipped,
            "fid": p.fid,
            "new_fid": None if new is None else new.fid,
            "new_fid_nimg": None if new is None else new.nimg,
            "best_fid": p.best_fid,
            "initial_fid": p.initial_fid,
            "teacher_fid": p.teacher_fid,
        }
        self.outside.report(metrics | figures)

    def _measure_start(self) -> None:
        """FID of the teacher and of the untrained generator: what the run has to reach, and where it starts."""
        if self.config.evaluation.num_images and self.config.evaluation.teacher_steps:
            self.progress.teacher_fid = self.evaluator.teacher_fid()
        average = self.networks.generator.average()
        self._take(self.evaluations.evaluate(average, now=True))
        self.progress.initial_fid = self.progress.fid
        self._sample(average)
        self._report({})

    def _take(self, found: list[Found]) -> bool:
        """Take note of evaluations, oldest first; returns whether one is the best so far."""
        better = [self._take_one(evaluation) for evaluation in found]
        self.unreported += found
        return any(better)

    def _take_one(self, found: Found) -> bool:
        """Keep the average if it is the best, else False; without FID, keep the latest."""
        p, better = self.progress, False
        p.fid = found.fid
        if p.fid is None or (math.isfinite(p.fid) and (p.best_fid is None or p.fid < p.best_fid)):
            better = p.fid is not None
            p.best_fid, p.best_nimg = p.fid, found.nimg
            if self.world.is_first:
                self.best_to_save = BestToSave(found.average(), p.model_copy())
                self.attempt("generator", self._save_best)
        if self.board and p.fid is not None:
            fids = {"fid/generator": p.fid, "fid/best": p.best_fid, "fid/teacher": p.teacher_fid}
            self.board.fid(found.nimg, {name: fid for name, fid in fids.items() if fid is not None})
            self.board.fid_curve(p.teacher_fid)
        return better

    def _save_best(self) -> None:
        if self.best_to_save:
            self.evaluator.save_best(*self.best_to_save)
            self.best_to_save = None

    def _sample(self, average: dict[str, Tensor]) -> None:
        if self.board and self.config.run.sample_images:
            self.board.picture(self.progress.nimg, self._picture(self.evaluator.generator(average)))

    def _picture(self, generator: OneStepGenerator) -> NDArray[np.uint8]:
        """A grid of images; points are drawn beside the teacher's."""
        run = self.config.run
        if generator.denoiser.image_shape[1:] == (1, 1):
            generated = generator.sample(POINTS, seed=run.seed)
            return plot_points({"one step": generated, "teacher, many steps": self.evaluator.teacher_points})
        return tile(*sample_grid(generator, run.sample_images, run.seed))

    def _checkpoint(self, leaving: bool) -> None:
        """Write a checkpoint; a failure is warned about. TrainingStopped after too many, or if none follows."""
        run, p, depot = self.config.run, self.progress, self.run.depot
        problem = save_checkpoint(depot, self.networks, p, self.world, self._before_marker)
        if problem is None:
            self.failed_checkpoints = 0
            if self.world.is_first:
                best = [p.best_nimg] if p.best_nimg is not None and p.best_fid is not None else []
                wanted = best + p.waiting_for_fid if run.keep_best else []
                self.attempt("removing old checkpoints", lambda: clean_up(depot, run.keep_checkpoints, wanted))
            self.evaluations.tidy()
            return
        self.failed_checkpoints += 1
        text = f"the checkpoint at {p.nimg / 1000:g} kimg could not be written: {problem}"
        if leaving or self.failed_checkpoints >= run.max_checkpoint_failures:
            raise TrainingStopped(
                f"{text} ({self.failed_checkpoints} in a row, run.max_checkpoint_failures "
                f"{run.max_checkpoint_failures}); the same command goes on from the last one that was"
            )
        if self.board:
            self.board.scalars(p.nimg, {"checkpoint/failures": float(self.failed_checkpoints)})
            self.outside.note(f"warning: {text}; training goes on")

    def _before_marker(self) -> None:
        """What a checkpoint takes for granted must be safe before it counts."""
        self.run.check_owner()
        self._save_best()
        if self.mirror:
            self.mirror.push()
